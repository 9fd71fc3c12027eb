"""The self-test's programs: cuDNN accepts a graph for each, forward and backward."""

import pytest

from cudnn_flex_compile.engine.key import problem_of
from cudnn_flex_compile.engine.selftest import PROGRAMS, call_of
from tests.deviceless.accepted import lowerings, verdict


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_accepted(program):
    forward = problem_of(call_of(program, 0))
    for problem in (forward, forward.backward()):
        refusals = [verdict(problem, lowering) for lowering in lowerings(problem.program)]
        assert None in refusals, f"{problem.direction}: {refusals}"
