"""Rules of the support table that depend on a call's size."""

import dataclasses

import pytest

from cudnn_flex_compile.engine.problem import FORWARD
from cudnn_flex_compile.engine.support import refused
from cudnn_flex_compile.reasons import Code
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.integers import LONGEST
from cudnn_flex_compile.scoremod.ir import F32, I32, SCORE
from cudnn_flex_compile.scoremod.masks.linear import KV, Q
from cudnn_flex_compile.scoremod.optable import make
from tests.deviceless.accepted import problem

THREE = ir.const(3, I32)
DIVIDING = {
    "remainder": ir.program(mask=make("eq", make("mod", Q - KV, THREE), ir.const(0, I32))),
    "quotient": ir.program(SCORE + ir.cast(make("idiv", Q - KV, THREE), F32)),
}


@pytest.mark.parametrize("name", DIVIDING)
def test_integers_are_divided_up_to_a_length(name):
    """Beyond it float32 is too coarse; the CPU's kernel divides integers, and tile lists leave no mask to a plan."""
    program = DIVIDING[name]
    for length in (LONGEST, LONGEST + 1):
        for lengths in ((length, 512), (512, length)):
            found = refused(problem(program, FORWARD, lengths=lengths), program)
            assert (found and found.code) == (Code.ILLEGAL_OP if length > LONGEST else None)
    assert refused(problem(program, FORWARD, lengths=lengths), program, on_cpu=True) is None
    tiled = dataclasses.replace(problem(program, FORWARD, lengths=lengths), tiled=True)
    assert refused(tiled, program) is None
    plain = ir.program(mask=make("ge", Q, KV))
    assert refused(problem(plain, FORWARD, lengths=lengths), plain) is None
