"""cuDNN's forward takes the largest score of each row as an output, beside the log-sum-exp from 9.21 on.

The package keeps calls that ask for it (MAX_SCORES in docs/limits.md): acceptance says nothing of numbers, which
`python3 -m tests.measure.row_maximum` compares on a GPU.
"""

import itertools

import pytest

from cudnn_flex_compile.engine.problem import FORWARD
from tests.support.row_maximum import BOTH_FROM, PROGRAMS, with_maximum

from .accepted import lowerings, problem, program_of, verdict


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_strategy_has_the_row_maximum(name):
    import cudnn

    program = program_of(*PROGRAMS[name])
    found, together = lowerings(program), cudnn.backend_version() >= BOTH_FROM
    assert found
    with with_maximum():
        for lowering, sm in itertools.product(found, (80, 90, 100)):
            refusal = verdict(problem(program, FORWARD), lowering, sm)
            assert (refusal is None) == together, (lowering.strategy, sm, refusal)
