"""Masks as disjoint boxes: any union of constant bounds, pair by pair, by brute force.

Knows nothing of the plans that compute a box.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import environment, evaluate
from cudnn_flex_compile.scoremod.ir import F32, I32, TRUE, Expr, Program
from cudnn_flex_compile.scoremod.masks.bound import SIDES, Bound
from cudnn_flex_compile.scoremod.masks.boxes import MAX_BOXES, Box, boxes, in_boxes, pruned, unshifted
from cudnn_flex_compile.scoremod.masks.form import MaskForm, as_predicate, hides, split, tightest
from cudnn_flex_compile.scoremod.masks.intervals import VIEWS
from cudnn_flex_compile.scoremod.masks.linear import KV, Q
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.partition import partition
from cudnn_flex_compile.scoremod.simplify import simplify
from tests.support.mask_sources import normal

pytestmark = pytest.mark.any_torch
Lengths = tuple[int, int]
CONSTANTS = {"lower": (-6, 12), "upper": (-6, 12), "start": (-8, 2), "end": (-2, 12)}
BOUNDS = st.sampled_from([side for side in SIDES if in_boxes(Bound(side, 0))]).flatmap(
    lambda side: st.builds(Bound, st.just(side), st.integers(*CONSTANTS[side]))
)
UNIONS = st.lists(st.lists(BOUNDS, min_size=1, max_size=2), min_size=2, max_size=3)
FORMS = st.tuples(st.lists(BOUNDS, max_size=2), st.one_of(UNIONS, UNIONS, st.none()))
LENGTHS = st.tuples(*[st.sampled_from([14, 13, 11, 8, 5, 3, 1])] * 2)
SCORE = ir.SCORE * 2.0 + ir.cast(Q, F32) * 16.0 + ir.cast(KV, F32)  # tells every pair from every other


def form_of(bounds: Sequence[Bound], union: Sequence[Sequence[Bound]] | None) -> MaskForm:
    """The bounds, and one of the union's conjunctions."""
    residual = TRUE
    for i, choice in enumerate(union or []):
        together = TRUE
        for bound in choice:
            together = make("and", together, bound.predicate())
        residual = make("or", residual, together) if i else together
    return MaskForm(tightest(list(bounds)), residual=simplify(residual))


def solved(source: str) -> Program:
    return partition(normal(source))[0]


def values(root: Expr, lengths: Lengths) -> torch.Tensor:
    """[Sq, Skv], at scores of 1."""
    axes = {axis: torch.arange(n, dtype=torch.int32).view(VIEWS[axis]) for axis, n in zip("qk", lengths, strict=True)}
    return evaluate(root, environment(torch.ones(1, 1, 1, 1), axes, {}, {0: 3}, {})).expand(1, 1, *lengths)[0, 0]


def visible(bounds: Sequence[Bound], union: Sequence[Sequence[Bound]] | None, lengths: Lengths) -> torch.Tensor:
    """[Sq, Skv], by the definition of bounds."""
    q, kv = torch.arange(lengths[0])[:, None], torch.arange(lengths[1])
    anchors = {"lower": q - kv, "upper": kv - q, "start": kv, "end": -kv}
    everything = torch.ones(lengths, dtype=torch.bool)

    def all_of(choice: Sequence[Bound]) -> torch.Tensor:
        mask = everything
        for bound in choice:
            mask = mask & (anchors[bound.side] + bound.constant >= 0)
        return mask

    any_of = torch.stack([all_of(choice) for choice in union]).any(0) if union else everything
    return all_of(bounds) & any_of


def computed(found: Sequence[Box], score: Expr, lengths: Lengths) -> tuple[torch.Tensor, torch.Tensor]:
    """[Sq, Skv]: how many boxes show a pair, and the score that the last one computes, each from its own corner."""
    count, total = torch.zeros(lengths, dtype=torch.int32), torch.zeros(lengths)
    for box in found:
        assert 0 <= box.top < box.bottom <= lengths[0]
        assert 0 <= box.left < box.right <= lengths[1]
        program, own = box.program(score), (box.bottom - box.top, box.right - box.left)
        mask = values(program.mask, own)
        inside = slice(box.top, box.bottom), slice(box.left, box.right)
        count[inside] += mask
        total[inside][mask] = values(program.score, own)[mask]
        assert box.pairs() == int(mask.sum()) or None not in (box.lower, box.upper)
        assert all(bool(mask.any(axis).all()) for axis in (0, 1)), "a line that the box does not need"
        assert all(bound is None or bound >= 0 for bound in box.local())
        assert not split(program.mask).residual.args, "a box is bounds alone"
    return count, total


@settings(max_examples=1000)
@given(FORMS, LENGTHS)
def test_boxes_are_the_mask_once(form, lengths: Lengths) -> None:
    found, expected = boxes(form_of(*form), lengths), visible(*form, lengths)
    if found is None:
        return
    assert 0 < len(found) <= MAX_BOXES
    score = values(SCORE, lengths) * expected
    for these in (found, unshifted(found)):
        count, total = computed(these, SCORE, lengths)
        assert torch.equal(count, expected.int()), these
        assert torch.equal(total, score), these
    for box in unshifted(found):
        assert not box.local()[0]


def test_most_unions_are_few_boxes() -> None:
    """Of the random ones above."""
    count = {"empty": 0, "one": 0, "several": 0, "refused": 0}

    @settings(max_examples=1000)
    @given(FORMS, LENGTHS)
    def check(form, lengths: Lengths) -> None:
        found = boxes(form_of(*form), lengths)
        if found is None:
            count["refused" if visible(*form, lengths).any() else "empty"] += 1
        else:
            count["one" if len(found) == 1 else "several"] += 1

    check()
    assert count["several"] >= 20, count
    assert count["one"] >= 100, count
    assert count["refused"] <= 60, count


NAMED = {  # at 40 rows and 50 columns: top, bottom, left, right, lower, upper; how many when unshifted
    "q >= kv": ([Box(0, 40, 0, 40, 0)], 1),
    "q > kv": ([Box(1, 40, 0, 39, -1)], 1),
    "q + 4 >= kv": ([Box(0, 40, 0, 44, 4)], 2),
    "(q >= kv) | (kv < 12)": ([Box(0, 40, 0, 40, 0), Box(0, 11, 1, 12, None, -1)], 2),
    "(q >= kv) & ((q - kv <= 9) | (kv < 4))": (
        [Box(0, 40, 0, 40, 0, 9), Box(10, 40, 0, 4, -10)], 2,
    ),
    "(q - kv).abs() <= 6": ([Box(0, 40, 0, 46, 6, 6)], 2),
    "kv < 12": ([Box(0, 40, 0, 12)], 1),
    "(kv < 12) | (kv >= 45)": ([Box(0, 40, 0, 12), Box(0, 40, 45, 50)], 2),
    "kv <= 100": ([Box(0, 40, 0, 50)], 1),
}  # fmt: skip


@pytest.mark.parametrize("source", NAMED)
def test_boxes_of_known_masks(source: str) -> None:
    lengths, (expected, pieces) = (40, 50), NAMED[source]
    found = boxes(split(solved(source).mask), lengths)
    assert found == expected
    assert len(unshifted(found)) == pieces
    for these in (found, unshifted(found)):
        count, _ = computed(these, SCORE, lengths)
        assert torch.equal(count, values(normal(source).mask, lengths).int())


@pytest.mark.parametrize(
    "form",
    [
        MaskForm((Bound("end", -1, ((1, ir.operand(0, I32, "b")),)),)),
        MaskForm((Bound("lower", 0, ((1, ir.scalar(0, I32)),)),)),
        MaskForm(biases=(ir.operand(0, F32, "k"),)),
        MaskForm(residual=make("eq", make("mod", KV, ir.const(3, I32)), ir.const(1, I32))),
        MaskForm(residual=make("or", make("ge", Q, KV), make("gt", ir.operand(0, I32, "b"), KV))),
        MaskForm((Bound("end", -1),)),
    ],
    ids=["operand", "scalar", "bias", "modulo", "union with an operand", "nothing visible"],
)
def test_what_is_no_union_of_boxes(form: MaskForm) -> None:
    assert boxes(form, (8, 8)) is None


def test_a_large_union_is_refused_early() -> None:
    source = " & ".join(f"((q - kv >= {i}) | (kv - q >= {i + 1}))" for i in range(1, 12))
    assert boxes(split(solved(source).mask), (64, 64)) is None


TERM = Bound("end", -1, ((1, ir.scalar(0, I32)),))


@settings(max_examples=400)
@given(FORMS, LENGTHS, st.booleans())
def test_pruned_keeps_the_mask_and_drops_what_always_holds(form, lengths: Lengths, term: bool) -> None:
    whole = form_of(*form)
    whole = replace(whole, bounds=tightest([*whole.bounds, TERM])) if term else whole
    program = ir.program(SCORE, as_predicate(whole))
    less = pruned(program, lengths)
    assert less.score is program.score
    assert torch.equal(values(less.mask, lengths), values(program.mask, lengths))
    before, after = split(program.mask), split(less.mask)
    assert set(after.bounds) <= set(before.bounds)
    assert (after.residual, after.biases) == (before.residual, before.biases)
    assert all(b.terms or not values(b.predicate(), lengths).all() for b in after.bounds)
    assert pruned(less, lengths) is less


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        ("q - kv < 64", ()), ("q - kv < 39", ("upper",)), ("q - kv < 40", ()), ("kv < 50", ()), ("kv < 49", ("end",)),
        ("(q >= kv) & (q - kv < 64) & (kv >= 0)", ("lower",)), ("q + 49 >= kv", ()), ("q + 48 >= kv", ("lower",)),
    ],
)  # fmt: skip
def test_pruned_bounds_of_known_masks(source: str, kept: tuple[str, ...]) -> None:
    less: Program = pruned(solved(source), (40, 50))
    assert tuple(b.side for b in split(less.mask).bounds) == kept


def test_pruned_keeps_biases() -> None:
    bias = hides(ir.operand(0, F32, "k"))
    program = ir.program(mask=make("and", bias, make("ge", ir.const(99, I32), KV)))
    assert pruned(program, (8, 8)).mask is bias
