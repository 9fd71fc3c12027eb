"""The mask on which all plans by tile lists are certified: what its rows see, and that it shows wrong lists."""

import copy
from dataclasses import fields

import pytest
import torch

from cudnn_flex_compile.config import Policy
from cudnn_flex_compile.engine.certify.certify import certify
from cudnn_flex_compile.engine.certify.reference import ProgramReference
from cudnn_flex_compile.engine.choose import OF_SHAPES, certified
from cudnn_flex_compile.engine.problem import FORWARD, Problem, TensorSpec, dense, out_spec
from cudnn_flex_compile.engine.tiles.edge_mask import BLOCK, EDGE_MASK, EDGE_PROGRAM, KINDS
from cudnn_flex_compile.kernels import cpu
from cudnn_flex_compile.kernels.arguments import Arguments
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import visible_rows
from cudnn_flex_compile.scoremod.masks.intervals import most_endpoints
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.text import text
from tests.support.flash import FlashStandIn
from tests.support.ready import Ready

CPU = torch.device("cpu")
BATCH, HEADS, DIM = 1, 2, 16
OTHERS = [field.name for field in fields(Problem) if field.name != "program"]
ROW, KEY = ir.index("q"), ir.index("k")


def visible(rows, columns):
    (found,) = [mask for _, mask in visible_rows(EDGE_MASK, [], [], [], (1, 1, rows, columns), 1, CPU)]
    return found[0, 0]


def test_rows_are_of_all_kinds():
    seen = visible(KINDS * BLOCK, 300)
    runs, one, all_but_one, nothing, everything = seen.view(KINDS, BLOCK, 300)
    ends = {int(row.sum()) for row in runs[0::2]} | {300 - int(row.sum()) for row in runs[1::2]}
    assert {tile + step for tile in (64, 80, 96, 128, 192) for step in (-1, 0, 1)} <= ends
    assert [int(n) for n in (one.sum(), (~all_but_one).sum(), nothing.sum(), (~everything).sum())] == [1, 1, 0, 0]
    assert int(most_endpoints(seen[None, None])) == 3, "as many as lists of usual masks have room for"


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 300), (300, 1), (77, 33), (700, 513)])
def test_any_lengths_have_it(rows, columns):
    assert visible(rows, columns).shape == (rows, columns)


class ByList(Ready):
    """The CPU's kernel in place of a plan by a list, which may be of a mask that is wrong somewhere."""

    strategy, device = "tile_lists", CPU

    def __init__(self, problem, wrong=lambda mask: mask):
        self.problem, self.outputs, self.wrong = problem, (problem.query, problem.key, problem.value), wrong

    def on_harder_mask(self):
        other = copy.copy(self)
        other.problem = Problem(EDGE_PROGRAM, *[getattr(self.problem, name) for name in OTHERS])
        return other

    def run(self, tensors, operands, ints, floats):
        mask = self.wrong(self.problem.program.mask)
        rest = Arguments(operands, ints, floats, text(ir.program(mask=mask)), self.problem.scale)
        shape = self.problem.lse_shape
        if self.problem.direction == FORWARD:
            query, key, value, out, stats = tensors
            cpu.forward(query, key, value, rest, out, stats.view(shape))
            return
        query, key, value, out, stats, grad, *gradients = tensors
        found = cpu.backward(grad, None, query, key, value, out, stats.view(shape), rest)
        for gradient, other in zip(gradients, found, strict=True):
            gradient.copy_(other)


class Graph(ByList):
    """A plan of another kind."""

    def on_harder_mask(self):
        return None


def causal_problem():
    query, key = (dense(TensorSpec((BATCH, heads, 300, DIM), (), torch.bfloat16)) for heads in (HEADS, 1))
    program = ir.program(mask=make("ge", ROW, KEY))
    return Problem(program, FORWARD, query, key, key, out_spec(query, key), (), 0.25, 0, tiled=1)


@pytest.mark.parametrize("lse_gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 300), (300, 1), (77, 33), (700, 513), (1024, 1024)])
def test_plans_that_round_as_flash_attention_does_pass_at_any_lengths(rows, columns, dtype, lse_gradient):
    query, key = (dense(TensorSpec((1, heads, n, 64), (), dtype)) for heads, n in ((2, rows), (1, columns)))
    problem = Problem(EDGE_PROGRAM, FORWARD, query, key, key, out_spec(query, key), (), 0.125, 0, tiled=1)
    reference, forward = ProgramReference(EDGE_PROGRAM), FlashStandIn(problem)
    assert certify(forward, forward, reference, OF_SHAPES) is None
    assert certify(FlashStandIn(problem.backward(lse_gradient)), forward, reference, OF_SHAPES) is None


def number(value):
    return ir.const(value, ir.I32)


LOST = {  # of the mask alone: whoever has only the user's does not see it
    "a pair that is alone in its block": make("eq", make("idiv", ROW, number(BLOCK)), number(1)),
    "the key before an edge": make("eq", KEY, number(79)),
}


def without(lost):
    return lambda mask: make("and", mask, make("not", lost)) if mask is EDGE_MASK else mask


@pytest.mark.parametrize("backward", [False, True])
def test_right_lists_pass_and_wrong_ones_do_not(backward):
    problem = causal_problem()
    reference = ProgramReference(problem.program)
    asked, forward = (problem.backward() if backward else problem), ByList(problem)
    plan = ByList(asked)
    assert certified(plan, forward if backward else plan, reference, Policy()) is None
    for name, lost in LOST.items():
        plan = ByList(asked, without(lost))
        assert certified(plan, forward if backward else plan, reference, Policy()) is not None, name


def test_a_graph_beside_a_list_has_no_such_mask():
    problem = causal_problem()
    reference = ProgramReference(problem.program)
    for plan, forward in ((ByList, Graph), (Graph, ByList)):
        assert certified(plan(problem.backward()), forward(problem), reference, Policy()) is None
