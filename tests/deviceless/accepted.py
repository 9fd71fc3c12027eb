"""Has the real cuDNN judge a program under every strategy, in both directions.

Knows nothing of which programs there are.
"""

import itertools

import torch

from cudnn_flex_compile.engine.attention_graph import assemble
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, Problem, TensorSpec, dense, out_spec
from cudnn_flex_compile.engine.strategies import STRATEGIES
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.partition import Hoisted, partition
from cudnn_flex_compile.scoremod.ranges import narrow
from cudnn_flex_compile.scoremod.simplify import normalize
from cudnn_flex_compile.scoremod.text import text
from cudnn_flex_compile.scoremod.trace import trace

from .harness import judge

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 64
LENGTHS = (512, 512)


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


def problem(program, direction, operands=(), lengths=LENGTHS, dtype=torch.bfloat16, head_dim=DIM):
    def spec(heads, length):
        stride = (length * heads * head_dim, head_dim, heads * head_dim, 1)
        return TensorSpec((BATCH, heads, length, head_dim), stride, dtype)

    query, key = spec(HEADS, lengths[0]), spec(KV_HEADS, lengths[1])
    forward = Problem(text(program), FORWARD, query, key, key, out_spec(query, key), operands, 0.125, 0)
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


def assert_accepted(program, operands=(), sm=90, directions=(FORWARD, BACKWARD), **how):
    found = lowerings(program)
    assert found
    for lowering, direction in itertools.product(found, directions):
        refusal = verdict(problem(program, direction, operands, **how), lowering, sm)
        assert refusal is None, f"{lowering.strategy}, {direction}: {refusal}"
