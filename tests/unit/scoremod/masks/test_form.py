"""The normal form of masks: every spelling of a bound is found, nothing else is, and the mask stays what it was.

Knows nothing of what else a mask can be solved into (test_solve.py).
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import environment, evaluate
from cudnn_flex_compile.scoremod.ir import F32, I32, SCORE, TRUE, Expr
from cudnn_flex_compile.scoremod.masks.bound import Bound
from cudnn_flex_compile.scoremod.masks.form import MaskForm, as_predicate, conjuncts, hides, split, tightest
from cudnn_flex_compile.scoremod.masks.solve import solve
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.partition import partition
from cudnn_flex_compile.scoremod.ranges import AXIS_LIMIT, VALUE_LIMIT
from cudnn_flex_compile.scoremod.simplify import normalize, simplify
from cudnn_flex_compile.scoremod.text import infix
from tests.support.evaluate import differing, direct, interpreted, operands_of, program_of, scores
from tests.support.generate import B, H, Mod, mask_mods
from tests.support.generate import K as COLUMNS
from tests.support.generate import Q as QUERIES
from tests.support.mask_sources import assert_every_step_keeps, conjunction, normal

pytestmark = pytest.mark.any_torch
Q, KV = ir.index("q"), ir.index("k")


@settings(max_examples=200)
@given(mask_mods())
def test_the_form_is_the_mask(mask_mod: Mod) -> None:
    program, hoisted = partition(normalize(program_of(None, mask_mod)))
    form, score = split(program.mask), torch.zeros_like(scores())
    operands, expected = operands_of(hoisted), direct(mask_mod)
    assert differing(interpreted(as_predicate(form), score, operands), expected) == 0
    parts = [b.predicate() for b in form.bounds] + [hides(bias) for bias in form.biases] + [form.residual]
    together = torch.stack([interpreted(part, score, operands) for part in parts]).all(0)
    assert differing(together, expected) == 0
    check_answers(form, lambda expression: interpreted(expression, score, operands))


def check_answers(form: MaskForm, value_of: Callable[[Expr], torch.Tensor]) -> None:
    """Compares what the form answers of itself with the values of its parts at all pairs, [pairs] each."""
    by_row = B * H * QUERIES, COLUMNS
    selected, added = value_of(as_predicate(form.without_biases())), value_of(form.added_to(make("abs", SCORE)))
    shown = torch.stack([torch.ones_like(selected), *(value_of(hides(bias)) for bias in form.biases)]).all(0)
    assert torch.equal(added >= 0, shown.expand_as(added))
    assert form.only_bounds == (as_predicate(form) is as_predicate(MaskForm(form.bounds)))
    assert form.skips_tiles == (form.without_biases() == MaskForm(form.bounds))
    if form.unmasked:
        assert selected.all()
    assert form.reads_pairs or all("k" in bias.dims and "q" not in bias.dims for bias in form.biases)
    if form.rows_are_intervals:
        for row, columns in zip(selected.expand(shown.shape).view(by_row), shown.view(by_row), strict=True):
            assert (torch.diff(row[columns].int()) == 1).sum() + row[columns][:1].sum() <= 1
    if form.rows_are_intervals and form.biases:
        assert (shown.view(B, H, QUERIES, COLUMNS) == shown.view(B, H, QUERIES, COLUMNS)[:, :, :1]).all()


SPELLINGS = [
    # causal, in every spelling
    ("q >= kv", {"lower": 0}), ("kv <= q", {"lower": 0}), ("kv < q + 1", {"lower": 0}), ("q + 1 > kv", {"lower": 0}),
    ("q - kv >= 0", {"lower": 0}), ("kv - q <= 0", {"lower": 0}), ("0 <= q - kv", {"lower": 0}),
    ("~(q < kv)", {"lower": 0}), ("torch.logical_not(kv > q)", {"lower": 0}), ("q - kv > -1", {"lower": 0}),
    ("torch.ge(q, kv)", {"lower": 0}), ("-kv >= -q", {"lower": 0}),
    ("torch.where(q >= kv, True, False)", {"lower": 0}), ("torch.where(q < kv, False, True)", {"lower": 0}),
    ("(q >= kv) & True", {"lower": 0}), ("q.to(torch.int64) >= kv.long()", {"lower": 0}),
    ("q.new_ones((), dtype=torch.bool) & ((kv + 0) <= (q + 0))", {"lower": 0}),
    ("(q >= kv).to(torch.bool)", {"lower": 0}),
    ("2 * q - q >= kv", {"lower": 0}), ("(q >= kv) & (q >= kv)", {"lower": 0}), ("~~(q >= kv)", {"lower": 0}),
    # strict, shifted
    ("q > kv", {"lower": -1}), ("kv < q", {"lower": -1}), ("q >= kv + 1", {"lower": -1}), ("q + 5 >= kv", {"lower": 5}),
    ("q + 5 > kv", {"lower": 4}), ("kv - q <= 3", {"lower": 3}), ("kv - q < 3", {"lower": 2}),
    ("kv - 3 <= q", {"lower": 3}),
    ("~(kv - 3 > q)", {"lower": 3}), ("kv - q - 3 <= 4", {"lower": 7}), ("kv > q - 64", {"upper": 63}),
    # windows
    ("q - kv <= 64", {"upper": 64}), ("q - kv < 64", {"upper": 63}), ("kv >= q - 64", {"upper": 64}),
    ("kv + 64 >= q", {"upper": 64}), ("~(q - kv > 64)", {"upper": 64}), ("64 >= q - kv", {"upper": 64}),
    ("(q >= kv) & (q - kv <= 64)", {"lower": 0, "upper": 64}), ("(q - kv).abs() <= 8", {"lower": 8, "upper": 8}),
    ("torch.abs(q - kv) < 8", {"lower": 7, "upper": 7}), ("8 >= torch.abs(kv - q)", {"lower": 8, "upper": 8}),
    ("abs(q - kv + 2) <= 8", {"lower": 10, "upper": 6}),
    ("~((q - kv).abs() > 8)", {"lower": 8, "upper": 8}), ("~((q < kv) | (q - kv > 64))", {"lower": 0, "upper": 64}),
    # the tightest of several
    ("(q >= kv) & (q + 3 >= kv) & (q - kv < 9) & (q - kv < 5)", {"lower": 0, "upper": 4}),
    # columns
    ("kv < 100", {"end": 99}), ("kv <= 100", {"end": 100}), ("100 > kv", {"end": 99}), ("kv >= 7", {"start": -7}),
    ("kv > 7", {"start": -8}), ("(kv >= 2) & (kv < 9)", {"start": -2, "end": 8}), ("~(kv >= 9)", {"end": 8}),
    ("(q >= kv) & (kv < 100) & (kv >= 1)", {"start": -1, "end": 99, "lower": 0}),
    # through a multiple, a difference of multiples, a float
    ("2 * q >= 2 * kv", {"lower": 0}), ("3 * (q - kv) <= 10", {"upper": 3}), ("(q - kv) // 4 < 3", {"upper": 11}),
    ("q.float() >= kv.float()", {"lower": 0}), ("q / 1 >= kv", {"lower": 0}), ("q - kv < 2.5", {"upper": 2}),
    ("kv > 3.0", {"start": -4}), ("q == kv", {"lower": 0, "upper": 0}),
    ("(q - kv).clamp(min=0) <= 5", {"upper": 5}), ("~((q < kv) ^ False)", {"lower": 0}),
    ("torch.where(q >= kv, q - kv, 9) <= 8", {"lower": 0, "upper": 8}),
    # what always holds, and what never does
    ("(q >= kv) | (q < kv)", {}), ("(kv >= 0) & (q + kv >= 0)", {}), ("q >= 0", {}),
    ("(q + 0 >= 0) & (kv < 9)", {"end": 8}), ("(q >= kv) & (q - kv >= -3)", {"lower": 0}),
    ("(q > kv) & (q < kv)", {"lower": -1, "upper": -1}), ("(kv < 0) | (b < 0) & False", {"end": -1}),
    ("((q >= kv) | (kv < 100)) & (kv < 50)", {"end": 49}), ("((q >= kv) & (kv < 9)) | (q >= kv)", {"lower": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("source", "bounds"), SPELLINGS, ids=[s for s, _ in SPELLINGS])
def test_bounds(source: str, bounds: dict[str, int]) -> None:
    """By the whole road, without an operand."""
    program, hoisted = partition(normal(source))
    form = split(program.mask)
    assert {b.side: b.constant for b in form.bounds} == bounds
    assert not any(b.terms for b in form.bounds)
    assert (hoisted, form.biases, form.residual) == ([], (), TRUE), infix(program.mask)
    assert_every_step_keeps(source, {}, (1, 1, 70, 110))


ROW = ir.operand(0, I32, "bq")
LIMIT = ir.operand(1, I32, "b")
COLUMN = ir.operand(2, I32, "k")
NUMBER = ir.scalar(0, I32)


def one(value: int) -> Expr:
    return ir.const(value, I32)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (make("gt", LIMIT, KV), Bound("end", -1, ((1, LIMIT),))),
        (make("ge", LIMIT, KV), Bound("end", 0, ((1, LIMIT),))),
        (make("ge", KV, ROW), Bound("start", 0, ((-1, ROW),))),
        (make("gt", KV, ROW), Bound("start", -1, ((-1, ROW),))),
        (make("ge", NUMBER, Q - KV), Bound("upper", 0, ((1, NUMBER),))),
        (make("gt", NUMBER, Q - KV), Bound("upper", -1, ((1, NUMBER),))),
        (make("ge", Q + NUMBER, KV), Bound("lower", 0, ((1, NUMBER),))),
        (make("ge", Q - NUMBER, KV + one(3)), Bound("lower", -3, ((-1, NUMBER),))),
        (make("ge", KV, ROW - NUMBER), Bound("start", 0, ((-1, ROW), (1, NUMBER)))),
    ],
    ids=lambda x: infix(x) if isinstance(x, Expr) else x.side,
)
def test_bounds_with_terms(mask: Expr, expected: Bound) -> None:
    form = split(simplify(mask))
    assert form.bounds == (expected,)
    assert form.residual is TRUE


@pytest.mark.parametrize(
    "mask",
    [
        make("ge", KV, COLUMN),  # a limit that varies along kv is none
        make("ge", Q, LIMIT),
        make("ge", KV, LIMIT + LIMIT),
        make("ge", KV, LIMIT * 2.0),
        make("ge", KV, LIMIT * LIMIT),
        make("ge", ir.cast(KV, F32), ir.operand(3, F32, "b")),
        make("ne", LIMIT, one(0)),
        make("ge", KV + NUMBER + NUMBER * 3, ROW),
    ],
    ids=infix,
)
def test_terms_that_make_no_bound(mask: Expr) -> None:
    assert split(simplify(mask)).bounds == ()


def test_bounds_with_different_terms_are_all_kept() -> None:
    both = make("and", make("gt", LIMIT, KV), make("and", make("gt", ROW, KV), make("gt", one(9), KV)))
    form = split(simplify(both))
    assert {b.terms for b in form.bounds} == {((1, LIMIT),), ((1, ROW),), ()}
    assert tightest([Bound("end", 4), Bound("end", 2), Bound("end", 3)]) == (Bound("end", 2),)


def test_the_trivial_mask() -> None:
    assert split(TRUE) == MaskForm()
    assert as_predicate(MaskForm()) is TRUE
    assert conjuncts(TRUE) == []


EXTREME_ROWS = torch.tensor([0, 1, 255, 2**15, 2**22 + 3, AXIS_LIMIT - 2, AXIS_LIMIT - 1])
CONSTANTS = [
    0, 1, -1, 2, 127, 128, 129, 2**15, -(2**24), 2**28, -(2**28), 2**29, 2**30, -(2**30), 2**31 - 1, -(2**31),
    2**31 - 2**24,
]  # fmt: skip


@st.composite
def sums(draw, depth: int = 3) -> Expr:
    """I32 sums and products of q, kv, a scalar and constants, many of which overflow."""
    if depth == 0 or draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from([Q, KV, Q, KV, NUMBER, *map(one, CONSTANTS)]))
    kind = draw(st.sampled_from(["add", "sub", "add", "sub", "mul", "neg", "abs"]))
    left = draw(sums(depth - 1))
    if kind in ("neg", "abs"):
        return make(kind, left)
    return make(kind, left, draw(sums(depth - 1)) if kind != "mul" else one(draw(st.sampled_from(CONSTANTS))))


def shifted(axis: Expr) -> st.SearchStrategy[Expr]:
    return st.one_of(sums(), st.sampled_from(CONSTANTS).map(lambda c: axis + one(c)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_overflow_is_no_bound(dtype: torch.dtype) -> None:
    """32-bit arithmetic wraps, and 64-bit arithmetic does not: at any index the form is what torch computes.

    Scalars have 64 bits, so beside 32-bit indices the number is a constant.
    """
    bounded = 0

    @settings(max_examples=600)
    @given(
        shifted(Q),
        shifted(KV),
        st.sampled_from(["ge", "gt", "le", "lt"]),
        st.sampled_from([0, 5, VALUE_LIMIT, -VALUE_LIMIT]),
    )
    def check(left: Expr, right: Expr, compare: str, number: int) -> None:
        nonlocal bounded
        mask = make(compare, left, right)
        mask = ir.rebuild(mask, {NUMBER: one(number)}) if dtype == torch.int32 else mask
        rows = EXTREME_ROWS.to(dtype)
        leaf = environment(torch.zeros((1, 1)), {"q": rows.view(-1, 1), "k": rows}, {}, {0: number}, {})
        form = split(simplify(mask))
        bounded += bool(form.bounds)
        expected = evaluate(mask, leaf).expand(7, 7)
        for found in (form, solve(simplify(mask))):
            whole = as_predicate(found) if isinstance(found, MaskForm) else conjunction(found)
            assert torch.equal(evaluate(whole, leaf).expand(7, 7), expected), f"{infix(mask)}: {found}"

    check()
    assert bounded >= 20, "too few generated masks are bounds"
