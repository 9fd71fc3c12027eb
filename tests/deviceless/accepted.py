"""Has the real cuDNN judge a program under every strategy, in both directions.

Knows nothing of which programs there are.
"""

import itertools

import torch

from cudnn_flex_compile.engine.graph.build import assemble
from cudnn_flex_compile.engine.graph.emit import operand_view
from cudnn_flex_compile.engine.graph.strategies import STRATEGIES
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, Problem, TensorSpec, dense, out_spec
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.optable import TABLE
from cudnn_flex_compile.scoremod.partition import Hoisted, partition
from cudnn_flex_compile.scoremod.ranges import narrow
from cudnn_flex_compile.scoremod.simplify import normalize
from cudnn_flex_compile.scoremod.trace import trace

from .harness import SMS, judge

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 64
LENGTHS = (512, 512)
# Architectures whose backward takes fewer graphs: it has two row vectors of its own, and an operand along q is one too
# many; and it has no gradients of activations, such as relu_backward.
FEWER = (80, 86, 89, 120)


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def partitioned(score_mod=None, mask_mod=None):
    """The program of functions that capture nothing, and what it needs as operands."""
    device = torch.device("cpu")
    score = narrow(trace(Module(score_mod), True, [], device)) if score_mod else ir.SCORE
    mask = narrow(trace(Module(mask_mod), False, [], device)) if mask_mod else ir.TRUE
    return partition(normalize(ir.program(score, mask)))


def program_of(score_mod=None, mask_mod=None):
    program, hoisted = partitioned(score_mod, mask_mod)
    assert not hoisted
    return program


def operand(dims, dtype, lengths=LENGTHS):
    shape = tuple(n if a in dims else 1 for a, n in zip(ir.AXES, (BATCH, HEADS, *lengths), strict=True))
    return dense(TensorSpec(shape, shape, dtype))


def operands_of(hoisted: list[Hoisted], lengths=LENGTHS):
    return tuple(operand(part.dims, part.stored, lengths) for part in hoisted)


def problem(
    program, direction, operands=(), lengths=LENGTHS, dtype=torch.bfloat16, head_dim=DIM, value_dim=None
):  # fmt: skip
    def spec(heads, length, dim):
        return TensorSpec((BATCH, heads, length, dim), (length * heads * dim, dim, heads * dim, 1), dtype)

    query, key = spec(HEADS, lengths[0], head_dim), spec(KV_HEADS, lengths[1], head_dim)
    value = spec(KV_HEADS, lengths[1], value_dim or head_dim)
    forward = Problem(program, FORWARD, query, key, value, out_spec(query, value), operands, 0.125, 0)
    return forward if direction == FORWARD else forward.backward()


def verdict(problem, lowering, sm=90):
    """None, or why cuDNN refuses."""
    built = []

    def build(arguments):
        built.append(assemble(problem, lowering, **arguments))
        return built[-1].graph

    found = judge(build, sm)
    built[-1].callbacks.clear()
    return found


def lowerings(program):
    """Of each strategy that takes the program."""
    found = (strategy.lower(program, True) for strategy in STRATEGIES)
    return [lowering for lowering in found if not isinstance(lowering, Reason)]


def assert_accepted_everywhere(program, operands=()):
    """On every architecture, less what the backward of some refuses."""
    for sm, lowering, direction in itertools.product(SMS, lowerings(program), (FORWARD, BACKWARD)):
        asked = problem(program, direction, operands)
        refusal = verdict(asked, lowering, sm)
        expected = refusal_of(asked, lowering) if direction == BACKWARD and sm in FEWER else None
        assert (refusal is None) == (expected is None), f"SM{sm}, {lowering.strategy}, {direction}: {refusal}"
        assert expected is None or expected in refusal


def refusal_of(problem, lowering):
    """What the log says where a backward is refused by the architectures of FEWER, or None."""
    nodes = list(ir.walk(*lowering.leaves))
    if any(str(TABLE[n.kind].cudnn).endswith("_backward") for n in nodes if n.kind in TABLE):
        return "Backward activations are not supported"
    views = [operand_view(n, problem) for n in nodes if n.kind == "operand" and lowering.lengths is None]
    return "sq broadcasted vectors" if any(v.shape[2] > 1 and v.shape[3] == 1 for v in views) else None


def assert_accepted(program, operands=(), sm=90, directions=(FORWARD, BACKWARD), **how):
    found = lowerings(program)
    assert found
    for lowering, direction in itertools.product(found, directions):
        refusal = verdict(problem(program, direction, operands, **how), lowering, sm)
        assert refusal is None, f"{lowering.strategy}, {direction}: {refusal}"
