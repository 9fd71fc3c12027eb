"""Derivatives: the symbolic backward in float64 is what torch.autograd gives for the user's own function."""

import pytest
import torch
from hypothesis import given, settings

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.derive import NoDerivative, derive
from cudnn_flex_compile.scoremod.ir import F32, GRAD, I32, SCORE
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.simplify import normalize, powers, simplify
from cudnn_flex_compile.scoremod.trace import trace
from tests.support.evaluate import CPU, PAIRS, differing, direct, interpreted, scores, traced
from tests.support.generate import Mod, score_mods

pytestmark = pytest.mark.any_torch
WEIGHTS = torch.linspace(-2, 3, PAIRS, dtype=torch.float64)


def by_autograd(value: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    if not value.requires_grad:
        return torch.zeros_like(score)
    found = torch.autograd.grad(value, score, WEIGHTS, allow_unused=True)[0]
    return torch.zeros_like(score) if found is None else found


def by_derive(root: ir.Expr, score: torch.Tensor) -> torch.Tensor:
    gradient = derive(root)
    return torch.zeros_like(score) if gradient is None else interpreted(gradient, score, (), WEIGHTS)


@settings(max_examples=300)
@given(score_mods())
def test_generated_scores(mod: Mod) -> None:
    """Every fourth score is a multiple of a quarter, as the constants are: ties and clamps at their bounds."""
    score = scores(high=True).requires_grad_()
    expected = by_autograd(direct(mod, score), score)
    root = traced(mod)
    torch.testing.assert_close(by_derive(root, score.detach()), expected, rtol=1e-9, atol=1e-9)
    normal = normalize(ir.program(root))
    visible = interpreted(normal.mask, score.detach())  # elsewhere the score_mod returns -inf
    got = by_derive(normal.score, score.detach())
    torch.testing.assert_close(got[visible], expected[visible], rtol=1e-5, atol=1e-5)  # constants fold in float32


SPECIAL_POINTS = [0.0, 1.0, -1.0, 0.5, -0.5, 2.0, 3.0, -3.0, 1e-8, 25.0, -25.0, 100.0, -100.0]
FUNCTIONS = {
    "abs": torch.abs,
    "sign": lambda s: torch.sign(s) + s,
    "relu": torch.relu,
    "maximum with a constant": lambda s: torch.maximum(s, torch.full_like(s, 1.0)),
    "minimum with a constant": lambda s: torch.minimum(s, torch.full_like(s, 0.5)),
    "maximum with itself": lambda s: torch.maximum(s, s * 1.0),
    "maximum of two that tie": lambda s: torch.maximum(s, -s),
    "minimum of two that tie": lambda s: torch.minimum(s * 2, s * s),
    "clamp": lambda s: s.clamp(-1, 0.5),
    "clamp to a point": lambda s: s.clamp(0.5, 0.5),
    "clamp with crossed bounds": lambda s: s.clamp(2, -1),
    "clamp_min": lambda s: s.clamp(min=-1),
    "clamp_max": lambda s: s.clamp(max=2),
    "clamp to infinities": lambda s: s.clamp(-float("inf"), float("inf")),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
    "gelu": torch.nn.functional.gelu,
    "gelu tanh": lambda s: torch.nn.functional.gelu(s, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "sqrt of a square": lambda s: torch.sqrt(s * s + 1),
    "square": torch.square,
    "cube": lambda s: s**3,
    "fourth power": lambda s: s**4,
    "power of one": lambda s: s**1 + s**1.0,
    "power of zero": lambda s: s**0 + s,
    "power of one and a half": lambda s: (s * s) ** 1.5,
    "floor and ceil": lambda s: torch.floor(s) + torch.ceil(s) * s,
    "reciprocal": lambda s: torch.reciprocal(s * s + 1),
    "division by itself": lambda s: s / (s * s + 1),
    "where on the score": lambda s: torch.where(s >= 0.5, s * s, -s),
    "where on the score, strict": lambda s: torch.where(s > 0.5, s * s, -s),
    "a predicate as a number": lambda s: (s > 0).to(s.dtype) * s,
    "masked_fill": lambda s: s.masked_fill(s < 0, 0.25),
    "sin and cos": lambda s: torch.sin(s) * torch.cos(s),
    "exp and log": lambda s: torch.log(torch.exp(s * 0.125) + 1),
    "subtraction from a constant": lambda s: 1 - s,
    "division of a constant": lambda s: 2 / (s * s + 0.5),
    "a constant": lambda s: torch.zeros_like(s) + 3,
    "negation": lambda s: -torch.neg(s) - s * 2,
    "the identity": lambda s: s,
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ties_bounds_and_tails(name: str) -> None:
    function = FUNCTIONS[name]
    points = torch.zeros(PAIRS, dtype=torch.float64)
    points[: len(SPECIAL_POINTS)] = torch.tensor(SPECIAL_POINTS, dtype=torch.float64)
    score = points.clone().requires_grad_()
    expected = by_autograd(function(score), score)
    root = trace(lambda score, b, h, q, kv: function(score), True, [], CPU)
    for form in (root, simplify(root), simplify(powers(root))):
        got = by_derive(form, points)
        assert differing(got.isnan(), expected.isnan()) == 0
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_a_score_that_does_not_matter_has_no_gradient() -> None:
    assert derive(ir.cast(ir.index("q"), F32)) is None
    assert derive(make("floor", SCORE)) is None
    assert derive(make("where", make("ge", SCORE, ir.const(0.0, F32)), ir.const(1.0, F32), ir.const(2.0, F32))) is None


def test_the_gradient_of_the_score_itself() -> None:
    assert derive(SCORE) is GRAD
    assert simplify(derive(SCORE + ir.cast(ir.index("q"), F32)) or SCORE) is GRAD


@pytest.mark.parametrize(
    ("root", "op"),
    [
        (make("relu_grad", SCORE, SCORE), "relu_grad"),
        (make("silu_grad", SCORE, SCORE), "silu_grad"),
        (make("pow", ir.const(2.0, F32), SCORE), "pow"),
        (make("clamp_min", ir.const(2.0, F32), SCORE), "clamp_min"),
        (make("clamp_max", SCORE, SCORE * 2.0), "clamp_max"),
    ],
)
def test_what_has_no_derivative_is_named(root: ir.Expr, op: str) -> None:
    with pytest.raises(NoDerivative) as error:
        derive(root)
    assert error.value.op == op


def test_integers_carry_no_gradient() -> None:
    root = SCORE * ir.cast(make("abs", ir.index("q") - ir.const(3, I32)), F32)
    torch.testing.assert_close(
        by_derive(root, scores(high=True)), WEIGHTS * interpreted(root, torch.ones(PAIRS)).double()
    )
