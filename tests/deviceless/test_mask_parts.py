"""The real cuDNN accepts what masks are made of: lengths, row limits, biases, and every box of a divided mask.

Knows nothing of how a user's mask became these parts.
"""

import pytest
import torch

from cudnn_flex_compile.bench.mods import softcap
from cudnn_flex_compile.engine.graph.strategies.native import NAME as NATIVE
from cudnn_flex_compile.engine.plans.box_plan import BoxPlan, assemble_boxes
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, output_specs
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, I32, SCORE
from cudnn_flex_compile.scoremod.masks.boxes import boxes, unshifted
from cudnn_flex_compile.scoremod.masks.form import hides, split
from cudnn_flex_compile.scoremod.masks.linear import KV, Q
from cudnn_flex_compile.scoremod.optable import make

from .accepted import FEWER, assert_accepted, lowerings, operand, problem, program_of, verdict
from .harness import SMS

CAUSAL = make("ge", Q, KV)
BANDS = {
    "alone": (),
    "causal": (CAUSAL,),
    "causal window": (CAUSAL, make("ge", KV + ir.const(63, I32), Q)),
    "window": (make("ge", KV + ir.const(63, I32), Q),),
    "shifted causal": (make("ge", Q + ir.const(8, I32), KV),),
}
CAPPED = program_of(softcap(20.0)).score
GIVEN = {"plain": SCORE, "soft cap": CAPPED}


def under(score, *predicates):
    mask = ir.TRUE
    for predicate in predicates:
        mask = make("and", mask, predicate)
    return ir.program(score, mask)


def end(position, dims):
    return make("gt", ir.operand(position, I32, dims), KV)


def start(position, dims):
    return make("ge", KV, ir.operand(position, I32, dims))


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("bands", ["alone", "causal", "causal window"])
def test_lengths_as_native_arguments(bands, sm):
    program = under(SCORE, end(0, "b"), *BANDS[bands])
    lowering = lowerings(program)[0]
    assert (lowering.strategy, lowering.lengths) == (NATIVE, 0)
    for direction in (FORWARD, BACKWARD):
        assert verdict(problem(program, direction, (operand("b", torch.int32),)), lowering, sm) is None


@pytest.mark.parametrize("score", GIVEN)
@pytest.mark.parametrize("bands", BANDS)
@pytest.mark.parametrize("dims", ["k", "bk", "bhk", "qk", "bqk", "bhqk"])
def test_biases(dims, bands, score):
    program = under(GIVEN[score], hides(ir.operand(0, F32, dims)), *BANDS[bands])
    for dtype in (torch.bfloat16, torch.float16):  # of the query; the bias is bfloat16
        assert_accepted(program, (operand(dims, torch.bfloat16),), dtype=dtype)


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("dims", ["bk", "qk"])
def test_biases_on_every_architecture(dims, sm):
    assert_accepted(under(SCORE, hides(ir.operand(0, F32, dims)), CAUSAL), (operand(dims, torch.bfloat16),), sm=sm)


LIMITS = ["", "b", "h", "bh", "q", "bq", "hq", "bhq"]


@pytest.mark.parametrize("score", GIVEN)
@pytest.mark.parametrize("bands", BANDS)
@pytest.mark.parametrize("dims", LIMITS)
def test_limits_of_rows(dims, bands, score):
    limits = (operand(dims, torch.int32),) * 2
    for given in ((end(0, dims),), (start(0, dims),), (start(0, dims), end(1, dims))):
        assert_accepted(under(GIVEN[score], *given, *BANDS[bands]), limits[: len(given)])


MIXED = {
    "two ends": ((end(0, "bq"), end(1, "b")), ("bq", "b"), (torch.int32,) * 2),
    "an end and a bias": ((end(0, "q"), hides(ir.operand(1, F32, "bk"))), ("q", "bk"), (torch.int32, torch.bfloat16)),
    "two biases": (
        tuple(hides(ir.operand(i, F32, dims)) for i, dims in enumerate(("bk", "qk"))),
        ("bk", "qk"), (torch.bfloat16,) * 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_several_operands(name):
    predicates, dims, dtypes = MIXED[name]
    operands = tuple(operand(d, t) for d, t in zip(dims, dtypes, strict=True))
    for score in GIVEN.values():
        assert_accepted(under(score, *predicates, CAUSAL), operands)


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("dims", ["b", "bq"])
def test_limits_of_rows_on_every_architecture(dims, sm):
    program, limit = under(CAPPED, end(0, dims), CAUSAL), (operand(dims, torch.int32),)
    assert_accepted(program, limit, sm, (FORWARD,))
    if sm not in FEWER:
        assert_accepted(program, limit, sm, (BACKWARD,))
        return
    for lowering in lowerings(program):
        assert "sq broadcasted vectors" in verdict(problem(program, BACKWARD, limit), lowering, sm)


DIVIDED = {
    "prefix-LM": lambda b, h, q, kv: (q >= kv) | (kv < 512),
    "sinks and a window": lambda b, h, q, kv: (q >= kv) & ((q - kv <= 256) | (kv < 4)),
    "symmetric window": lambda b, h, q, kv: (q - kv).abs() <= 256,
    "shifted causal": lambda b, h, q, kv: q + 5 >= kv,
    "strict causal": lambda b, h, q, kv: q > kv,
}
SCORES = {**GIVEN, "positions": CAPPED + ir.cast(Q - KV, F32) * 0.5}


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("name", DIVIDED)
def test_every_box_has_a_plan(name, direction, sm):
    for score in SCORES.values():
        program = ir.program(score, program_of(mask_mod=DIVIDED[name]).mask)
        whole = problem(program, direction, lengths=(4096, 4096))
        found = boxes(split(program.mask), whole.lengths)
        found = unshifted(found) if direction == BACKWARD else found
        plan = assemble_boxes(whole, program, found, lambda p, part: Accepted(p, part, sm))
        assert isinstance(plan, BoxPlan)
        assert len(plan.strategy.split(",")) == len(found)


class Accepted:
    """The first strategy that cuDNN takes for a box: a band without a residual, so never the dense one."""

    def __init__(self, program, problem, sm):
        self.outputs = output_specs(problem)
        refusals = {}
        for lowering in lowerings(program):
            refusals[lowering.strategy] = verdict_of(problem, lowering, sm)
            if refusals[lowering.strategy] is None:
                break
        self.strategy = lowering.strategy
        assert refusals[self.strategy] is None, refusals
        assert self.strategy != "dense", refusals


def verdict_of(problem, lowering, sm):
    """cuDNN's frontend refuses native windows of more queries than keys itself."""
    refusal = verdict(problem, lowering, sm)
    wide = problem.lengths[0] > problem.lengths[1] and "sliding_window_length" in lowering.native
    assert refusal is None or (wide and "max_s_q <= max_s_kv" in refusal)
    return refusal
