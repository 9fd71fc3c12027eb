"""The raw graphs of tests/support/wrong_classes.py would be right if cuDNN computed them right: only so does a
rejection on a GPU say something about cuDNN.

Knows nothing of cuDNN's numbers: the graphs run on tests/support/emulator.py, with what it knows to be wrong left out.
"""

import math
from unittest import mock

import pytest
import torch

from cudnn_flex_compile.engine.certify.reference import ProgramReference
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.engine.support import rewrites_off
from cudnn_flex_compile.scoremod.derive import derive
from cudnn_flex_compile.scoremod.interpret import environment, evaluate
from tests.deviceless.accepted import BATCH, HEADS, operand, problem
from tests.deviceless.test_wrong_classes import REFUSED, raw_lowering
from tests.support import emulator
from tests.support.dialect import POINTWISE
from tests.support.wrong_classes import CLASSES

MEANT = sorted(CLASSES.keys() - REFUSED - {"finite fill"})


def raw(case, direction, score, operands, grad):
    specs = tuple(operand(dims, dtype, case.lengths) for dims, dtype in case.operands)
    with (
        rewrites_off(*case.off),
        mock.patch.object(emulator, "WRONG", {}),
        mock.patch.object(emulator, "MISREAD", {}),
        mock.patch.object(emulator, "REFUSED", {}),
        mock.patch.dict(POINTWISE, mod=POINTWISE["mod"]._replace(compute=torch.fmod)),
    ):
        found = problem(case.program, direction, specs, case.lengths)
        return emulator.emulated(found, raw_lowering(case, direction), score, operands, {}, {}, grad)


@pytest.mark.parametrize("name", MEANT)
def test_the_raw_graph_is_what_is_asked_for(name):
    case = CLASSES[name]
    shape = (BATCH, HEADS, *case.lengths)
    generator = torch.Generator().manual_seed(0)
    score, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    specs = tuple(operand(dims, dtype, case.lengths) for dims, dtype in case.operands)
    sample = ProgramReference(case.program).sample(problem(case.program, FORWARD, specs, case.lengths), generator)
    operands = dict(enumerate(sample.operands))
    axes = {a: torch.arange(n, dtype=torch.int32).view([-1 if i == d else 1 for i in range(4)])
            for d, (a, n) in enumerate(zip("bhqk", shape, strict=True))}  # fmt: skip
    leaf = environment(score, axes, operands, {}, {}, grad)
    visible = evaluate(case.program.mask, leaf, True)
    expected = torch.where(visible, evaluate(case.program.score, leaf, True), -math.inf).expand(shape)
    torch.testing.assert_close(raw(case, FORWARD, score, operands, grad), expected, rtol=1e-6, atol=1e-6)
    gradient = derive(case.program.score)
    expected = evaluate(gradient, leaf, True).expand(shape)
    torch.testing.assert_close(raw(case, BACKWARD, score, operands, grad), expected, rtol=1e-6, atol=1e-6)


def test_a_finite_fill_hides_all_the_same():
    """But for rows without a visible key, which become the mean of all values."""
    case = CLASSES["finite fill"]
    score = torch.zeros((BATCH, HEADS, *case.lengths), dtype=torch.float64)
    found = raw(case, FORWARD, score, {}, score)
    hidden = torch.arange(512) - torch.arange(512)[:, None] < 40
    assert bool((found.masked_select(hidden) == -1e9).all())
    assert bool((found.masked_select(~hidden) == 0).all())
