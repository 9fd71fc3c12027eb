"""Each kind of made-up data catches a wrong plan that all others let through, and each lets right plans through.

Judged on the CPU. A wrong plan computes another function than is asked for, one that differs from it seldom.
"""

import math

import pytest
import torch

from cudnn_flex_compile.engine.certify.certify import certify
from cudnn_flex_compile.engine.certify.reference import ProgramReference
from cudnn_flex_compile.engine.certify.regimes import REGIMES
from cudnn_flex_compile.engine.certify.samples import sample_plan
from cudnn_flex_compile.engine.choose import OF_SHAPES
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, Problem, TensorSpec, out_spec
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, I32, SCORE
from cudnn_flex_compile.scoremod.masks.form import hides
from cudnn_flex_compile.scoremod.masks.linear import KV, Q
from cudnn_flex_compile.scoremod.optable import make
from tests.support.flash import FlashStandIn
from tests.unit.engine.certify.test_certify import StandIn, problem

CAUSAL = make("ge", Q, KV)
LIMIT = ir.operand(0, I32, "b")
LENGTHS = (TensorSpec((2, 1, 1, 1), (1, 1, 1, 1), torch.int32),)
OF_ROWS = (TensorSpec((2, 1, 70, 1), (70, 70, 1, 1), torch.int32),)
SLOPES = (TensorSpec((1, 4, 1, 1), (4, 1, 1, 1), torch.float32),)
COLUMNS = (TensorSpec((2, 1, 1, 90), (90, 90, 90, 1), torch.float32),)
BIAS = ir.operand(0, F32, "bk")


def number(value):
    return ir.const(value, F32)


def up_to(value):
    return make("min", SCORE, number(value))


HALVES = make("floor", SCORE * 2.0) * 0.5

# asked for, computed instead, operands, the regime that tells them apart
SELDOM_WRONG = {
    "scores below -60 are lost": (
        ir.program(mask=CAUSAL), ir.program(make("max", SCORE, number(-60.0)), CAUSAL), (),
        "scores shifted by -100"),
    "scores of about 100 are rounded": (
        ir.program(mask=CAUSAL),
        ir.program(make("where", make("gt", number(3.0), make("abs", SCORE - 100.0)), HALVES, SCORE), CAUSAL), (),
        "scores shifted by +100"),
    "scores beyond 400 are cut off": (
        ir.program(mask=CAUSAL), ir.program(up_to(400.0), CAUSAL), (), "outliers of 1e3 in three keys"),
    "an empty batch entry sees its first key": (
        ir.program(mask=make("gt", LIMIT, KV)),
        ir.program(mask=make("gt", make("max", LIMIT, ir.const(1, I32)), KV)), LENGTHS, "operands at their extremes"),
    "biases are cut off at 50": (
        ir.program(SCORE + BIAS), ir.program(SCORE + make("min", BIAS, number(50.0))), COLUMNS,
        "operands at their extremes"),
}  # fmt: skip


def without(name):
    return tuple(regime for regime in REGIMES if regime.name != name)


def verdict(asked, computed, direction, operands, regimes=REGIMES):
    forward = StandIn(problem(asked, FORWARD, operands))
    plan = StandIn(problem(asked, direction, operands), computed)
    return certify(plan, plan if direction == FORWARD else forward, ProgramReference(asked), regimes)


# A backward gives zeros for a row whose log-sum-exp says that it sees nothing.
BOTH_WAYS = [(name, direction) for name in SELDOM_WRONG for direction in (FORWARD, BACKWARD)]
BOTH_WAYS.remove(("an empty batch entry sees its first key", BACKWARD))


@pytest.mark.parametrize(("name", "direction"), BOTH_WAYS)
def test_each_regime_catches_what_others_miss(name, direction):
    asked, computed, operands, regime = SELDOM_WRONG[name]
    assert f"{regime}: " in verdict(asked, computed, direction, operands).detail
    assert verdict(asked, computed, direction, operands, without(regime)) is None


class Deduplicating(StandIn):
    """A softmax that counts the largest score of a row once, however often it is there."""

    def run(self, tensors, operands, ints, floats):
        super().run(tensors, operands, ints, floats)
        query, key, value, out, stats = tensors
        group = query.shape[1] // key.shape[1]
        keys, values = (t.float().repeat_interleave(group, dim=1) for t in (key, value))
        scores = (query.float() @ keys.mT * self.problem.scale).masked_fill(
            torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1), -math.inf
        )
        first = torch.arange(key.shape[2]) == scores.argmax(-1, keepdim=True)
        kept = torch.where((scores == scores.amax(-1, keepdim=True)) & ~first, -math.inf, scores)
        out.copy_(kept.softmax(-1) @ values)
        stats.copy_(kept.logsumexp(-1, keepdim=True))


def test_ties_catch_what_others_miss():
    asked = ir.program(mask=CAUSAL)
    plan = Deduplicating(problem(asked, FORWARD))
    assert "ties: out is off by" in certify(plan, plan, ProgramReference(asked)).detail
    assert certify(plan, plan, ProgramReference(asked), without("ties")) is None


class BeyondTheEnd(StandIn):
    """Sees a key of zeros behind the last one, as a kernel does that forgets where the keys end."""

    def run(self, tensors, operands, ints, floats):
        super().run(tensors, operands, ints, floats)
        *_, out, stats = tensors
        seen = torch.logaddexp(stats, torch.zeros(()))
        out.mul_(torch.exp(stats - seen))
        stats.copy_(seen)


class NothingBelow(StandIn):
    """dQ is NaN where the log-sum-exp is below the logarithm of the smallest float32: cuDNN 9.19 at some lengths."""

    def run(self, tensors, operands, ints, floats):
        super().run(tensors, operands, ints, floats)
        stats, dq = tensors[4], tensors[6]
        dq.masked_fill_(stats < -88.7, math.nan)


def test_faults_of_single_shapes_are_caught_at_every_shape():
    """Also where a kind of plans is known, so that fewer regimes are looked at (engine/certify/coverage.py)."""
    asked = ir.program(mask=CAUSAL)
    forward = BeyondTheEnd(problem(asked, FORWARD))
    assert "out is off by" in certify(forward, forward, ProgramReference(asked), OF_SHAPES).detail
    backward, right = NothingBelow(problem(asked, BACKWARD)), StandIn(problem(asked, FORWARD))
    assert "-100: dQ" in certify(backward, right, ProgramReference(asked), OF_SHAPES).detail
    assert certify(backward, right, ProgramReference(asked), without("scores shifted by -100")) is None


ROW_LIMITS = ir.program(mask=make("gt", ir.operand(0, I32, "bq"), KV))


class WrongWhereFewAreVisible(StandIn):
    """Wrong in rows that see exactly so many keys: what a kernel's special case for its last tile may do."""

    def __init__(self, problem, visible):
        super().__init__(problem)
        self.visible = visible

    def run(self, tensors, operands, ints, floats):
        super().run(tensors, operands, ints, floats)
        rows = (operands[0].clamp(0, self.problem.lengths[1]) == self.visible).expand(2, 4, 70, 1)
        written = tensors[3 if self.problem.direction == FORWARD else 6]
        written.copy_(torch.where(rows, 0.25, written))


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("visible", [0, 1])
def test_rows_that_see_nothing_or_one_key_are_among_the_sampled(direction, visible):
    forward = StandIn(problem(ROW_LIMITS, FORWARD, OF_ROWS))
    plan = WrongWhereFewAreVisible(problem(ROW_LIMITS, direction, OF_ROWS), visible)
    found = certify(plan, plan if direction == FORWARD else forward, ProgramReference(ROW_LIMITS))
    name = "out" if direction == FORWARD else "dQ"
    expected = f"{name} is not zero in" if visible == 0 else f"{name} is off by"
    assert expected in found.detail


def test_places_by_bounds_and_by_what_is_visible():
    """At length 1000: rows at the edges of the bounds, the first without a key, and one that sees a single key."""
    mask = make("and", make("ge", Q + ir.const(-300, I32), KV), make("ge", ir.const(777, I32), KV))
    program = ir.program(mask=mask)
    spec = TensorSpec((2, 4, 1000, 16), (64000, 16000, 16, 1), torch.bfloat16)
    found = Problem(program, FORWARD, spec, spec, spec, out_spec(spec, spec), (), 0.25, 0)
    sample = ProgramReference(program).sample(found, torch.Generator().manual_seed(0))
    where = sample_plan(found, sample, torch.device("cpu"))
    rows, columns = set(where.rows.tolist()), set(where.columns.tolist())
    assert {0, 299, 300, 301, 999, 127, 128} <= rows
    assert {0, 698, 699, 776, 777, 778, 999} <= columns
    assert {(int(b), int(h)) for b, h in zip(where.batches, where.heads, strict=True)} == {(0, 0), (1, 2), (1, 3)}


def unsampled_row():
    spec = problem(ir.program(mask=CAUSAL), FORWARD)
    sample = ProgramReference(ir.program(mask=CAUSAL)).sample(spec, torch.Generator().manual_seed(0))
    sampled = set(sample_plan(spec, sample, torch.device("cpu")).rows.tolist())
    return next(i for i in range(70) if i not in sampled)


class Forgetful(StandIn):
    """Leaves one row of one head that is not sampled as it was, of everything that it writes."""

    def run(self, tensors, operands, ints, floats):
        written = tensors[3:] if self.problem.direction == FORWARD else tensors[6:]
        before = [t.clone() for t in written]
        super().run(tensors, operands, ints, floats)
        for tensor, old in zip(written, before, strict=True):
            tensor[1, 1, unsampled_row()] = old[1, 1, unsampled_row()]


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_unwritten_memory_is_seen_in_rows_that_are_not_sampled(direction):
    asked = ir.program(mask=CAUSAL)
    plan = Forgetful(problem(asked, direction))
    found = certify(plan, StandIn(problem(asked, FORWARD)) if direction == BACKWARD else plan, ProgramReference(asked))
    assert f"{'dQ' if direction == BACKWARD else 'out'} has 16 unwritten entries" in found.detail


def beyond_the_end(tensors):
    """As a tile of 128 rows does that is written as a whole."""
    memory = tensors[0].untyped_storage()
    torch.empty(0, dtype=tensors[0].dtype).set_(memory)[-500] = 0.0


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_writing_beyond_the_end_is_seen(direction):
    asked = ir.program(mask=CAUSAL)
    plan = StandIn(problem(asked, direction), spoil=beyond_the_end)
    found = certify(plan, StandIn(problem(asked, FORWARD)) if direction == BACKWARD else plan, ProgramReference(asked))
    assert f"1 entries beside {'dQ' if direction == BACKWARD else 'out'} were written to" in found.detail


def infinite(tensors):
    tensors[0][0, 0, 64, 3] = math.inf


def no_number(tensors):
    tensors[-1][0, 0, 0] = math.nan


@pytest.mark.parametrize(
    ("direction", "spoil", "what"),
    [(FORWARD, infinite, "out is not finite"), (FORWARD, no_number, "the LSE is"), (BACKWARD, infinite, "dQ is not"),
     (BACKWARD, no_number, "dV is not finite")],
)  # fmt: skip
def test_infinities_and_nans(direction, spoil, what):
    asked = ir.program(mask=CAUSAL)
    forward = StandIn(problem(asked, FORWARD))
    plan = StandIn(problem(asked, direction), spoil=spoil)
    assert what in certify(plan, plan if direction == FORWARD else forward, ProgramReference(asked)).detail


def test_nans_of_the_users_function_are_met():
    """A logarithm of negative scores is NaN; a plan that gives numbers there is not what was asked for."""
    asked = ir.program(make("log", SCORE))
    plan = StandIn(problem(asked, FORWARD))
    assert certify(plan, plan, ProgramReference(asked)) is None
    bold = StandIn(problem(asked, FORWARD), ir.program(make("log", make("abs", SCORE) + 1.0)))
    assert "not NaN" in certify(bold, bold, ProgramReference(asked)).detail


ROUNDED = {
    "causal": (ir.program(mask=CAUSAL), ()),
    "soft cap": (ir.program(make("tanh", SCORE / 20.0) * 20.0, CAUSAL), ()),
    "ALiBi": (ir.program(SCORE + ir.operand(0, F32, "h") * ir.cast(KV - Q, F32), CAUSAL), SLOPES),
    "squares": (ir.program(SCORE * SCORE), ()),
    "lengths": (ir.program(mask=make("gt", LIMIT, KV)), LENGTHS),
    "limits of rows": (ROW_LIMITS, OF_ROWS),
    "bias along columns": (ir.program(SCORE * 0.5 + BIAS, CAUSAL), COLUMNS),
    "hidden columns": (ir.program(mask=make("and", CAUSAL, hides(BIAS))), COLUMNS),
    "window of a head": (ir.program(mask=make("ge", ir.operand(0, I32, "h"), make("abs", Q - KV))),
                         (TensorSpec((1, 4, 1, 1), (4, 1, 1, 1), torch.int32),)),
    "no pair": (ir.program(mask=make("ge", KV - Q, ir.const(100, I32))), ()),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROUNDED)
def test_plans_that_round_as_flash_attention_does_pass(name, dtype):
    program, operands = ROUNDED[name]
    forward = FlashStandIn(problem(program, FORWARD, operands, dtype=dtype))
    backward = FlashStandIn(problem(program, BACKWARD, operands, dtype=dtype))
    assert certify(forward, forward, ProgramReference(program)) is None
    assert certify(backward, forward, ProgramReference(program)) is None
