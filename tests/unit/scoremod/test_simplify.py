"""Simplification keeps every value, NaN and infinities included, and has nothing left to do the second time."""

import math

import pytest
import torch
from hypothesis import given, settings

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import BOOL, F32, FALSE, I32, I64, SCORE, TRUE
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.simplify import normalize, powers, simplify
from cudnn_flex_compile.scoremod.text import infix
from tests.support.evaluate import differing, direct, interpreted, masked, program_of, scores
from tests.support.generate import Grammar, Mod, mask_mods, score_mods

pytestmark = pytest.mark.any_torch
WILD = Grammar(smooth=False, pairs=True)
Q, KV = ir.index("q"), ir.index("k")
LATER = make("ge", KV, ir.const(9, I32))
NAN = ir.const(math.nan, F32)


def number(value: float, dtype: str = F32) -> ir.Expr:
    return ir.const(value, dtype)


@settings(max_examples=150)
@given(score_mods(WILD), mask_mods(Grammar(pairs=True)))
def test_normal_programs_have_the_same_masked_scores(score_mod: Mod, mask_mod: Mod) -> None:
    score = scores()
    expected = torch.where(direct(mask_mod), direct(score_mod, score), -math.inf)
    normal = normalize(program_of(score_mod, mask_mod))
    assert differing(masked(normal, score), expected) == 0
    assert simplify(normal.score) is normal.score, infix(normal.score)
    assert simplify(normal.mask) is normal.mask, infix(normal.mask)


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        (SCORE * 1.0, SCORE),
        (SCORE * 0.0, SCORE * 0.0),  # NaN * 0 is NaN
        (Q * number(0, I32), number(0, I32)),
        (SCORE - SCORE, SCORE - SCORE),
        (make("max", SCORE, SCORE), SCORE),
        (make("ge", SCORE, SCORE), make("ge", SCORE, SCORE)),  # NaN >= NaN is false
        (make("eq", SCORE, SCORE), make("eq", SCORE, SCORE)),
        (make("ge", Q, Q), TRUE),
        (make("gt", Q, Q), FALSE),
        (make("ne", Q, Q), FALSE),
        (make("ge", Q, number(0, I32)), TRUE),  # as HuggingFace's encoders mask nothing
        (make("ge", Q + KV, number(0, I32)), TRUE),
        (make("gt", Q, number(-1, I32)), TRUE),
        (make("gt", Q, number(0, I32)), make("gt", Q, number(0, I32))),
        (make("ge", Q - KV, number(0, I32)), make("ge", Q - KV, number(0, I32))),
        (make("ge", ir.capture(0, I32), number(0, I32)), make("ge", ir.capture(0, I32), number(0, I32))),
        (make("ge", Q + number(2**31 - 1, I32), KV), make("ge", Q + number(2**31 - 1, I32), KV)),  # it may wrap
        (make("not", make("ge", SCORE, NAN)), make("not", make("ge", SCORE, NAN))),  # ~(a >= b) is not a < b
        (make("not", make("ge", Q, KV)), make("gt", KV, Q)),
        (make("le", Q, KV), make("ge", KV, Q)),
        (make("where", TRUE, SCORE, NAN), SCORE),
        (make("where", make("ge", Q, KV), TRUE, FALSE), make("ge", Q, KV)),
        (make("where", make("ge", Q, KV), LATER, TRUE), make("or", make("gt", KV, Q), LATER)),
        (make("where", make("ge", Q, KV), FALSE, LATER), make("and", make("gt", KV, Q), LATER)),
        (make("eq", make("ge", Q, number(0, I32)), make("ge", Q, KV)), make("ge", Q, KV)),
        (make("ne", make("ge", Q, KV), TRUE), make("gt", KV, Q)),
        (make("eq", make("ge", Q, KV), FALSE), make("gt", KV, Q)),
        ((Q + number(3, I32)) - number(5, I32), Q + number(-2, I32)),
        ((SCORE + 0.1) + 0.2, (SCORE + 0.1) + 0.2),  # float addition rounds
        (make("ne", ir.cast(make("ge", Q, KV), I32), number(0, I32)), make("ge", Q, KV)),
        (make("bool", Q), make("ne", Q, number(0, I32))),
        # floats of integers that float32 holds are compared as integers
        (make("ge", ir.cast(Q, F32), ir.cast(KV, F32)), make("ge", Q, KV)),
        (make("gt", ir.cast(Q, F32), number(3.0)), make("gt", Q, number(3, I32))),
        (make("eq", ir.cast(ir.cast(Q, I64), F32), number(-0.0)), make("eq", ir.cast(Q, I64), number(0, I64))),
        (make("gt", ir.cast(Q, F32), number(2.5)), make("gt", ir.cast(Q, F32), number(2.5))),
        (make("ge", ir.cast(Q - KV, F32), number(3.0)), make("ge", Q - KV, number(3, I32))),
        (make("ge", ir.cast(Q + KV, F32), number(3.0)), make("ge", ir.cast(Q + KV, F32), number(3.0))),  # 2 ** 25
        (make("ge", ir.cast(Q, F32), number(math.inf)), make("ge", ir.cast(Q, F32), number(math.inf))),
        (make("exp", number(0.0)), number(1.0)),
        (make("idiv", number(-7, I32), number(2, I32)), number(-4, I32)),
        (make("mod", number(-7, I32), number(2, I32)), number(1, I32)),
        (make("lshift", Q, number(3, I32)), Q * number(8, I32)),
        (make("lshift", Q, number(31, I32)), Q * number(-(2**31), I32)),  # wraps, as torch does
        (make("lshift", Q, number(-1, I32)), number(0, I32)),
        (make("bitand", number(7, I32), Q), make("mod", Q, number(8, I32))),
        (make("bitand", Q, number(-8, I32)), make("idiv", Q, number(8, I32)) * number(8, I32)),
        (
            make("bitand", Q, number(12, I32)),
            make("mod", make("idiv", Q, number(4, I32)), number(4, I32)) * number(4, I32),
        ),
        (make("bitand", Q, number(5, I32)), make("bitand", Q, number(5, I32))),
        (make("bitand", Q, number(2**31 - 1, I32)), make("bitand", Q, number(2**31 - 1, I32))),
        (make("bitand", Q, number(-1, I32)), Q),
        (make("bitor", number(0, I32), Q), Q),
        (number(2**31 - 1, I32) + number(1, I32), number(-(2**31), I32)),  # wraps, as torch does
        # what wraps in 32 bits and not in 64 stays, for numbers beside it may have 64
        (Q - number(-(2**31), I32), Q - number(-(2**31), I32)),
        ((Q + number(2**30, I32)) + number(2**30, I32), (Q + number(2**30, I32)) + number(2**30, I32)),
        ((Q * number(2**16, I32)) * number(2**16, I32), (Q * number(2**16, I32)) * number(2**16, I32)),
        (ir.cast(number(2**32 + 5, I64), I32), number(5, I32)),
    ],
    ids=lambda e: infix(e).replace(" ", ""),
)
def test_rules(given_: ir.Expr, expected: ir.Expr) -> None:
    assert simplify(given_) is expected, f"{infix(simplify(given_))}, not {infix(expected)}"


@pytest.mark.parametrize("divisor", [0])
def test_a_constant_division_by_zero_is_left_alone(divisor: int) -> None:
    division = make("idiv", number(5, I32), number(divisor, I32))
    assert simplify(division) is division


@pytest.mark.parametrize("exponent", [2, 3, 4, 0.5, -0.5, -1, 1, 1.5, 0])
def test_powers_have_the_value_and_the_gradient_of_pow(exponent: float) -> None:
    power = simplify(powers(make("pow", SCORE, number(exponent))))
    score = scores(high=True).abs() + 0.125
    torch.testing.assert_close(interpreted(power, score), score**exponent, rtol=1e-12, atol=0)


def test_infinities_of_the_score_become_the_mask() -> None:
    causal, window = make("ge", Q, KV), make("ge", KV, Q + number(-2, I32))
    inner = make("where", window, SCORE * 2.0, number(-math.inf))
    program = normalize(ir.program(make("where", make("not", causal), number(-math.inf), inner), TRUE))
    assert program.score is SCORE * 2.0
    assert infix(program.mask) == infix(make("and", causal, window))


CAUSAL, HIDDEN, ODD = make("ge", Q, KV), number(-math.inf), make("ne", make("mod", KV, number(2, I32)), number(0, I32))
UNDER = make("where", CAUSAL, SCORE, HIDDEN)
INFINITIES = {
    "hidden elsewhere": (UNDER, SCORE, CAUSAL),
    "hidden there": (make("where", CAUSAL, HIDDEN, SCORE), SCORE, make("not", CAUSAL)),
    "in either branch": (
        make("where", ODD, UNDER, SCORE * 2.0), make("where", ODD, SCORE, SCORE * 2.0),
        make("or", make("and", ODD, CAUSAL), make("not", ODD)),
    ),
    "twice": (make("where", ODD, UNDER, HIDDEN), SCORE, make("and", ODD, CAUSAL)),
    "a sum": (SCORE * 2.0 + make("where", CAUSAL, number(0.5), HIDDEN), SCORE * 2.0 + 0.5, CAUSAL),
    "a sum of zeros": (SCORE + make("where", CAUSAL, number(0.0), HIDDEN), SCORE, CAUSAL),
    "a sum of two": (UNDER + make("where", ODD, SCORE, HIDDEN), SCORE + SCORE, make("and", CAUSAL, ODD)),
    "always": (make("where", CAUSAL, HIDDEN, HIDDEN), HIDDEN, FALSE),
    "a factor": (UNDER * 0.5, UNDER * 0.5, TRUE),  # stays: as good in the score
    "by the score": (make("where", make("ge", SCORE, number(0.0)), SCORE, HIDDEN), None, TRUE),
    "below a choice by the score": (make("where", make("ge", SCORE, number(0.0)), UNDER, SCORE), None, TRUE),
}  # fmt: skip


@pytest.mark.parametrize("name", INFINITIES)
def test_infinities_become_the_mask(name: str) -> None:
    given_, score, mask = INFINITIES[name]
    program = normalize(ir.program(given_))
    assert program.score is (given_ if score is None else score), infix(program.score)
    assert program.mask is simplify(mask), infix(program.mask)
    values = scores()
    assert differing(masked(program, values), interpreted(given_, values)) == 0


def test_types() -> None:
    assert simplify(make("where", make("ge", Q, KV), TRUE, make("ge", KV, Q))).dtype == BOOL
