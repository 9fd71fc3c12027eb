"""Operands declared for all batch entries and heads: cuDNN accepts what it accepts of the plain ones.

Knows nothing of which of the two it computes right.
"""

from dataclasses import replace

import pytest
import torch

from cudnn_flex_compile.engine.graph.emit import operand_view
from cudnn_flex_compile.engine.graph.strategies import chained
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, I32
from cudnn_flex_compile.scoremod.masks.form import hides
from cudnn_flex_compile.scoremod.masks.linear import KV, Q
from cudnn_flex_compile.scoremod.optable import make
from tests.deviceless.accepted import BATCH, HEADS, operand, problem, verdict

BIAS = hides(ir.operand(0, F32, "bqk"))
PROGRAMS = {
    "slopes and lengths": (
        ir.program(ir.SCORE + ir.operand(0, F32, "bh") * ir.cast(Q - KV, F32), make("gt", ir.operand(1, I32, "b"), KV)),
        (("bh", torch.float32), ("b", torch.int32)),
    ),
    "a bias for each batch entry": (ir.program(mask=BIAS), (("bqk", torch.bfloat16),)),
    "a bias and limits of rows": (
        ir.program(mask=make("and", make("gt", ir.operand(1, I32, "bhq"), KV), BIAS)),
        (("bqk", torch.bfloat16), ("bhq", torch.int32)),
    ),
}


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("name", PROGRAMS)
def test_accepted(name, direction):
    program, operands = PROGRAMS[name]
    found = problem(program, direction, tuple(operand(*o) for o in operands))
    lowering = replace(chained.lower(program, direction == BACKWARD), expanded=True)
    assert verdict(found, lowering) is None
    for node in (n for n in ir.walk(program.score, program.mask) if n.kind == "operand"):
        view = operand_view(node, found, expanded=True)
        assert view.shape[:2] == (BATCH, HEADS)
        given = found.operands[int(node.value)]
        for axis in range(2):
            assert view.stride[axis] == (given.stride[axis] if given.shape[axis] > 1 else 0)
