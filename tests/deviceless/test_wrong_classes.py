"""The raw graphs of tests/support/wrong_classes.py: cuDNN accepts them, whatever it then computes, but for those it
refuses.

Knows nothing of their numbers (tests/gpu/test_wrong_classes.py). A class that cuDNN no longer accepts needs no rewrite.
"""

import re
from pathlib import Path

import pytest

import cudnn_flex_compile
from cudnn_flex_compile.engine.graph.strategies import STRATEGIES
from cudnn_flex_compile.engine.problem import BACKWARD
from cudnn_flex_compile.engine.support import REWRITES, rewrites_off
from cudnn_flex_compile.reasons import Reason
from tests.deviceless.accepted import operand, problem, verdict
from tests.support.wrong_classes import CLASSES

REFUSED = {"difference of a scalar and the score", "operand on the left of a compare"}


def raw_lowering(case, direction):
    """The first that a strategy gives with the class's rewrites off."""
    training = direction == BACKWARD
    if case.raw is not None:
        return case.raw(case.program, training)
    found = (strategy.lower(case.program, training) for strategy in STRATEGIES)
    return next(lowering for lowering in found if not isinstance(lowering, Reason))


@pytest.mark.parametrize("name", CLASSES)
def test_accepted(name):
    case = CLASSES[name]
    for direction in case.directions:
        operands = tuple(operand(dims, dtype, case.lengths) for dims, dtype in case.operands)
        found = problem(case.program, direction, operands, case.lengths)
        with rewrites_off(*case.off):
            refusal = verdict(found, raw_lowering(case, direction))
        assert (refusal is not None) == (name in REFUSED), f"{direction}: {refusal}"
        if case.raw is None:
            rewritten = verdict(found, raw_lowering(case, direction))
            assert rewritten is None, f"{direction}, with the rewrites: {rewritten}"


def test_every_switched_rewrite_has_a_class():
    switched = {rewrite.name for rewrite in REWRITES if rewrite.switched}
    assert switched == {name for case in CLASSES.values() for name in case.off}


def test_rows_name_what_makes_them():
    """Each switch in the package is a row that can be switched off, and the row says where it is."""
    package = Path(cudnn_flex_compile.__file__).parent
    switches = {
        (name, str(path.relative_to(package)))
        for path in package.rglob("*.py")
        for name in re.findall(r'\bon\("([^"]+)"\)', path.read_text())
    }
    assert switches == {(r.name, where) for r in REWRITES if r.switched for where in r.where.split(", ")}
    for rewrite in REWRITES:
        assert all((package / where).exists() for where in rewrite.where.split(", ")), rewrite.where


def test_unknown_rewrites():
    with pytest.raises(ValueError, match=r"no such rewrite: maximum; valid: .*composite"), rewrites_off("maximum"):
        pass
