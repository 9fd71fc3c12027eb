"""A bound's answers against its meaning: the sum of its anchor, constant and terms is not negative.

Knows nothing of how bounds are found (test_form.py).
"""

import itertools

import pytest

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import I32, Expr
from cudnn_flex_compile.scoremod.masks.bound import SIDES, Bound
from cudnn_flex_compile.scoremod.masks.form import MaskForm
from cudnn_flex_compile.scoremod.masks.linear import Q
from cudnn_flex_compile.scoremod.masks.words import words

pytestmark = pytest.mark.any_torch
ANCHOR = {
    "lower": lambda q, kv: q - kv,
    "upper": lambda q, kv: kv - q,
    "start": lambda q, kv: kv,
    "end": lambda q, kv: -kv,
}
FIRST, SECOND = ir.operand(0, I32, "b"), ir.scalar(0, I32)
VALUE = {FIRST: 3, SECOND: 2}
TERMS = [(), ((1, FIRST),), ((-1, FIRST),), ((1, FIRST), (-1, SECOND)), ((1, FIRST), (1, FIRST))]
PAIRS = list(itertools.product(range(8), range(8)))


def visible(bound: Bound, q: int, kv: int) -> bool:
    """The bound as its docstring defines it."""
    return ANCHOR[bound.side](q, kv) + bound.constant + sum(sign * VALUE[term] for sign, term in bound.terms) >= 0


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("constant", range(-5, 6))
@pytest.mark.parametrize("terms", TERMS, ids=len)
def test_answers(side: str, constant: int, terms: tuple[tuple[int, Expr], ...]) -> None:
    bound = Bound(side, constant, terms)
    limit = bound.limit()
    for q, kv in PAIRS:
        at = limit.constant + sum(factor * {Q: q, **VALUE}[atom] for atom, factor in limit.factors.items())
        assert visible(bound, q, kv) == (kv <= at if bound.at_most else kv >= at)
        assert visible(bound.opposite(), q, kv) != visible(bound, q, kv)
    assert bound.diagonal == (Q in limit.factors)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("constant", range(-5, 6))
@pytest.mark.parametrize("terms", TERMS, ids=len)
def test_the_words_are_the_bound(side: str, constant: int, terms: tuple[tuple[int, Expr], ...]) -> None:
    (said,) = words(MaskForm((Bound(side, constant, terms),)))
    said = {"causal": "kv <= q"}.get(said, said.replace("window ", "q - kv <= "))
    for q, kv in PAIRS:
        names = {"q": q, "kv": kv, "b": 0, "operand0": [VALUE[FIRST]], "scalar0": VALUE[SECOND]}
        assert eval(said, names) == visible(Bound(side, constant, terms), q, kv), said
