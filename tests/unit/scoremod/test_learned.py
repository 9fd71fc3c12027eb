"""What captured tensors that require grad add to a score: found as a sum, or named as what is none."""

import pytest
import torch

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import environment, evaluate
from cudnn_flex_compile.scoremod.ir import F32, I32, SCORE
from cudnn_flex_compile.scoremod.learned import NotAdditive, position, position_in, reads, split_bias, without_bias
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.partition import partition
from cudnn_flex_compile.scoremod.simplify import normalize
from cudnn_flex_compile.scoremod.text import parse, text

B, H, Q, KV = (ir.index(a) for a in ir.AXES)
TABLE, SLOPES, FIXED = (ir.capture(i, F32) for i in range(3))
LEARNED = {TABLE, SLOPES}
SIZES = {"b": 2, "h": 3, "q": 5, "k": 7}


def at(leaf, *indices):
    return make("gather", leaf, *indices)


PAIRS, SLOPE, SHIFT = at(TABLE, H, Q, KV), at(SLOPES, H), at(FIXED, B)
BEHIND, ZERO = make("ge", Q, KV), ir.const(0.0, F32)
FORMS = {
    "a table": (SCORE + PAIRS, "hqk"),
    "the other way around": (PAIRS + SCORE, "hqk"),
    "a difference": (SCORE - PAIRS, "hqk"),
    "of the score": (PAIRS - SCORE, "hqk"),
    "negated": (-(SCORE + PAIRS), "hqk"),
    "slopes": (SCORE + SLOPE * ir.cast(KV - Q, F32), "hqk"),
    "a number for each head": (SCORE + SLOPE, "hqk"),
    "two of them": (SCORE + PAIRS + SLOPE * 2.0, "hqk"),
    "a product of them": (SCORE + PAIRS * SLOPE, "hqk"),
    "a function of them": (SCORE + make("tanh", PAIRS), "hqk"),
    "scaled": ((SCORE + PAIRS) * 0.5, "hqk"),
    "scaled from the left": (make("mul", SHIFT, SCORE + PAIRS), "bhqk"),
    "divided": ((SCORE + PAIRS) / 3.0, "hqk"),
    "behind a soft cap": (make("tanh", SCORE / 2.0) * 2.0 + PAIRS, "hqk"),
    "in some pairs": (make("where", BEHIND, SCORE + PAIRS, SCORE * 0.5), "hqk"),
    "one of two": (make("where", BEHIND, SCORE + PAIRS, SCORE + SLOPE), "hqk"),
    "beside what fits in": (SCORE + PAIRS + at(FIXED, H) * ir.cast(KV, F32), "hqk"),
    "beside what does not": (SCORE + PAIRS + SHIFT * ir.cast(KV, F32), "hqk"),
}


def values(root, leaf):
    return evaluate(root, leaf).expand(tuple(SIZES.values()))


@pytest.mark.parametrize("name", FORMS)
def test_the_sum_is_the_score(name):
    score, dims = FORMS[name]
    random = torch.Generator().manual_seed(0)
    captured = {TABLE: torch.randn(3, 5, 7, generator=random), SLOPES: torch.randn(3, generator=random)}
    captured[FIXED] = torch.randn(3, generator=random)
    scores = torch.randn(tuple(SIZES.values()), generator=random)
    views = {a: torch.arange(n).view([-1 if i == d else 1 for i in range(4)]) for d, (a, n) in enumerate(SIZES.items())}
    inner = environment(scores, {a: v.int() for a, v in views.items()}, {}, {}, {})

    def leaf(node):
        return captured[node] if node.kind == "capture" else inner(node)

    rest, bias = split_bias(score, LEARNED)
    assert not reads(rest, LEARNED)
    assert not ir.depends_on(bias, SCORE)
    torch.testing.assert_close(values(rest, leaf) + values(bias, leaf), values(score, leaf))
    program, hoisted = partition(ir.program(score, BEHIND), learned=LEARNED)
    operand = without_bias(program.score)[1]
    assert operand.dims == dims
    assert [h.learned for h in hoisted].index(True) == position(program) == position_in(text(program))
    assert not any(reads(h.expression, LEARNED) for h in hoisted if not h.learned)
    assert parse(text(program)) is program


def test_what_fits_into_the_tensor_is_added_there():
    (_, hoisted) = partition(ir.program(FORMS["beside what fits in"][0]), learned=LEARNED)
    assert len(hoisted) == 1
    subtracted = split_bias(SCORE + PAIRS - ir.cast(KV, F32) * 0.25, LEARNED)
    assert subtracted[0] is SCORE
    program, hoisted = partition(ir.program(FORMS["beside what does not"][0]), learned=LEARNED)
    assert [h.learned for h in hoisted].count(True) == 1 < len(hoisted)
    assert without_bias(program.score)[0] is not SCORE


NO_SUMS = {
    "a factor": SCORE * SLOPE,
    "a divisor": SCORE / SLOPE,
    "under a function": make("tanh", SCORE + PAIRS),
    "a square": (SCORE + PAIRS) * (SCORE + PAIRS),
    "scaled by the score": PAIRS * SCORE,
    "a condition": make("where", make("gt", SLOPE, ZERO), SCORE, SCORE * 0.5),
    "the larger one": make("max", SCORE, PAIRS),
}


@pytest.mark.parametrize("name", NO_SUMS)
def test_what_is_no_sum_is_named(name):
    with pytest.raises(NotAdditive, match=r"capture"):
        split_bias(NO_SUMS[name] + 1.0, LEARNED)


def test_a_mask_takes_no_gradient():
    hidden = make("where", make("gt", SLOPE, ZERO), SCORE, ir.const(float("-inf"), F32))
    with pytest.raises(NotAdditive, match="the mask"):
        partition(normalize(ir.program(hidden)), learned=LEARNED)


def test_nothing_learned_is_nothing_changed():
    for score in (SCORE, SCORE + PAIRS, SCORE * SLOPE):
        assert split_bias(score, set()) == (score, None)
        assert partition(ir.program(score), learned=set()) == partition(ir.program(score))
    assert position(ir.program(SCORE + ir.operand(0, F32, "hqk"))) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_where_they_hold_every_value(dtype):
    stored = {TABLE: dtype, SLOPES: dtype}
    kept = {name: partition(ir.program(FORMS[name][0]), stored, LEARNED)[1][0].stored for name in FORMS}
    exact = {
        "a table", "the other way around", "a number for each head", "in some pairs", "one of two", "of the score",
        "behind a soft cap",
    }  # fmt: skip
    assert {name for name, found in kept.items() if found == dtype} == exact
    assert set(kept.values()) == {dtype, torch.float32}


def test_integers_are_no_biases():
    """An index that a learned table is read at stays what it is."""
    where = make("gather", ir.capture(7, I32), Q)
    program, hoisted = partition(ir.program(SCORE + at(TABLE, H, where, KV)), learned=LEARNED)
    assert [h.dims for h in hoisted] == ["hqk"]
    assert without_bias(program.score)[0] is SCORE
