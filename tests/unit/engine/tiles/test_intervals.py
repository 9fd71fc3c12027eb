"""Certification of what runs by intervals, on the CPU: masks as predicates of rows and columns, right and wrong."""

import pytest
import torch

from cudnn_flex_compile.engine.certify.certify import certify
from cudnn_flex_compile.engine.certify.reference import ProgramReference
from cudnn_flex_compile.engine.problem import FORWARD, Problem, TensorSpec, dense, out_spec, output_specs
from cudnn_flex_compile.kernels import cpu
from cudnn_flex_compile.kernels.arguments import Arguments
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.masks.intervals import every_endpoint
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.partition import pairwise
from cudnn_flex_compile.scoremod.text import text
from tests.support.mask_sources import normal, used
from tests.support.ready import Ready

BATCH, HEADS, LENGTH, DIM = 2, 4, 150, 16
CPU = torch.device("cpu")
CAPTURED = {
    "ids": torch.arange(LENGTH).expand(BATCH, -1) // 20, "padding": torch.ones(BATCH, LENGTH, dtype=torch.bool),
    "starts": torch.arange(0, LENGTH, 10),
}  # fmt: skip
MASKS = (
    "(ids[b, q] == ids[b, kv]) & (q >= kv)", "(ids[b, q] == ids[b, kv]) & padding[b, kv]",
    "(starts[ids[b, q]] <= kv) & (kv <= q)",
)  # fmt: skip


class Runs(Ready):
    """The CPU's kernel in place of a plan, with a mask of its own."""

    strategy, device = "tile_lists", CPU

    def __init__(self, problem: Problem, mask: ir.Expr) -> None:
        self.problem, self.outputs, self.program = problem, output_specs(problem), text(ir.program(mask=mask))

    def run(self, tensors, operands, ints, floats):
        rest = Arguments(operands, ints, floats, self.program, self.problem.scale)
        if self.problem.direction == FORWARD:
            query, key, value, out, stats = tensors
            cpu.forward(query, key, value, rest, out, stats.view(BATCH, HEADS, LENGTH))
            return
        query, key, value, out, stats, grad, *gradients = tensors
        found = cpu.backward(grad, None, query, key, value, out, stats.view(BATCH, HEADS, LENGTH), rest)
        for gradient, value in zip(gradients, found, strict=True):
            gradient.copy_(value)


def problem_of(source):
    program, hoisted = pairwise(normal(source, used(source, CAPTURED)))
    sizes = dict(zip(ir.AXES, (BATCH, HEADS, LENGTH, LENGTH), strict=True))
    shapes = [tuple(n if axis in part.dims else 1 for axis, n in sizes.items()) for part in hoisted]
    operands = tuple(dense(TensorSpec(s, (), part.stored)) for s, part in zip(shapes, hoisted, strict=True))
    query, key = (dense(TensorSpec((BATCH, heads, LENGTH, DIM), (), torch.bfloat16)) for heads in (HEADS, 2))
    rest = (query, key, key, out_spec(query, key), operands, 0.25, 0)
    return Problem(program, FORWARD, *rest, tiled=True), program


@pytest.mark.parametrize("source", MASKS)
@pytest.mark.parametrize("training", [False, True])
def test_right_ones_pass_and_wrong_ones_do_not(source, training):
    problem, program = problem_of(source)
    reference, forward = ProgramReference(program), Runs(problem, program.mask)
    causal = make("ge", ir.index("q"), ir.index("k"))
    if not training:
        assert certify(forward, forward, reference) is None
        wrong = Runs(problem, causal)
        assert certify(wrong, wrong, reference) is not None
        return
    assert certify(Runs(problem.backward(), program.mask), forward, reference) is None
    assert certify(Runs(problem.backward(), causal), forward, reference) is not None


def test_endpoints_of_chunks_are_those_of_the_whole():
    mask = torch.rand(2, 1, 9, 12) < 0.5
    whole = every_endpoint(iter([(0, mask)]), (2, 4, 9, 12), 1, 12)
    parts = every_endpoint(iter([(0, mask[:, :, :4]), (4, mask[:, :, 4:])]), (2, 4, 9, 12), 1, 12)
    assert torch.equal(whole, parts)
