"""Solving masks for kv: what each spelling becomes, and that every part means what the source means.

Knows nothing of cuDNN. What a mask becomes is written as by `described`: constants of bounds, axes of the rest.
"""

import pytest
import torch

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import I32, I64, TRUE
from cudnn_flex_compile.scoremod.masks.bound import Bound
from cudnn_flex_compile.scoremod.masks.clauses import MAX_CLAUSES, Half, clauses
from cudnn_flex_compile.scoremod.masks.linear import KV, Q
from cudnn_flex_compile.scoremod.masks.solve import Solved, limit_of, solve
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.partition import partition
from cudnn_flex_compile.scoremod.simplify import simplify
from cudnn_flex_compile.scoremod.text import infix
from tests.support.mask_sources import assert_every_step_keeps, conjunction, described, leaves, normal, used, visible

pytestmark = pytest.mark.any_torch
SIZES = (2, 2, 18, 21)
INT_MAX, INT_MIN, LONG_MAX, LONG_MIN = 2**31 - 1, -(2**31), 2**63 - 1, -(2**63)


def integers(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def random(*shape: int, low: int = 0, high: int = 21, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


CAPTURED = {
    "lengths": integers(13, 0), "prefix": integers(5, 2, dtype=torch.int32), "windows": integers(0, 3),
    "offsets": integers(0, 4, 5, 15, 21, dtype=torch.int32), "padding": random(2, 21) > 6, "local": random(2) > 9,
    "doc": torch.bucketize(torch.arange(21), integers(4, 5, 15), right=True), "kinds": random(21, high=3),
    "bytes": random(21, high=3, dtype=torch.uint8), "start": random(18, low=-3), "ends": random(2, 18),
    "near": random(60, high=2) > 0, "bias": torch.linspace(-1, 1, 21), "picture": random(18, 21, high=2) > 0,
    "wide": integers(3, LONG_MAX), "low": integers(LONG_MIN + 1, 4), "int_end": integers(INT_MAX, 6, dtype=torch.int32),
    "int_low": integers(-INT_MAX, 3, dtype=torch.int32), "w": 6, "n": 3,
}  # fmt: skip


SOLVED = [
    # what an earlier version could not solve, or still cannot
    ("(q >= kv) | (kv < 4)", "residual"), ("q == kv", "lower 0, upper 0"), ("q != kv", "residual"),
    ("(q % 2) == (kv % 2)", "residual"), ("q // 4 == kv // 4", "start[q], end[q]"), ("q // 4 >= kv // 4", "end[q]"),
    ("q >= 3", "end[q]"), ("b >= kv", "end[b]"), ("2 * q >= kv", "end[q]"), ("q >= 2 * kv", "end[q]"),
    ("2 * q >= 2 * kv", "lower 0"), ("q + kv >= 3", "start[q]"), ("(q - kv).abs() >= 3", "residual"),
    ("q.float() >= kv.float()", "lower 0"), ("q * kv >= 3", "residual"), ("h >= q - kv", "start[hq]"),
    ("torch.maximum(q, kv) >= 3", "start[q]"), ("~(q - kv <= 4) & (q != 7) | (q >= kv)", "lower 0"),
    ("torch.abs(q - kv) <= torch.abs(kv)", "start[q]"), ("(q >= kv) ^ (kv < 3)", "residual"),
    ("q + (2**31 - 1) >= kv", "residual"), ("q - 2**30 - 2**30 >= kv - 2**30 - 2**30", "residual"),
    ("q + (2**31 - 5) > kv", "residual"), ("torch.abs(q - kv) <= 2**31 - 1", ""),
    ("q * 256 - q * 255 >= kv", "residual"), ("q / 1 >= kv", "lower 0"),
    # blocks, documents, lengths
    ("q // 16 == kv // 16", "start[q], end[q]"), ("kv // 4 >= q // 4 - 1", "start[q]"), ("kv // 5 < q // 5", "end[q]"),
    ("torch.div(q, 4, rounding_mode='floor') >= torch.div(kv, 4, rounding_mode='floor')", "end[q]"),
    ("(q - kv) // 4 <= 1", "upper 7"), ("(q - kv) // 4 >= -1", "lower 4"),
    ("(q // 8 + 4) * 8 + q % 8 >= kv", "lower 32"), ("q >= (kv // 8 + 1) * 8 + kv % 8", "lower -8"),
    ("q % 8 - kv + q // 8 * 8 <= 3", "upper 3"), ("2 * (q % 4) + q // 4 * 8 >= 2 * kv", "lower 0"),
    ("q // 8 * 7 + q % 8 >= kv", "end[q]"), ("q // -4 * -4 + q % -4 >= kv", "lower 0"),
    ("(kv - q - 3) // 4 == 0", "lower 6, upper -3"), ("kv < lengths[b]", "end[b]"), ("lengths[b] > kv", "end[b]"),
    ("~(kv >= lengths[b])", "end[b]"), ("(kv < lengths[b]) & (q < lengths[b])", "end[bq]"),
    ("(q >= kv) & (kv < lengths[b])", "lower 0, end[b]"), ("kv >= offsets[doc[q]]", "start[q]"),
    ("kv - offsets[doc[q]] >= 0", "start[q]"),
    ("(kv >= offsets[doc[q]]) & (kv < offsets[doc[q] + 1])", "start[q], end[q]"),
    ("(kv < offsets[doc[q] + 1]) & (q >= kv)", "lower 0, end[q]"), ("start[q] <= kv", "start[q]"),
    ("(kv < ends[b, q]) & (kv < lengths[b])", "end[bq]"),
    ("kv < torch.minimum(lengths[b], ends[b, q])", "end[bq]"),
    ("(kv < lengths[b]) & (q - kv >= -windows[h])", "end[bhq]"),
    ("(kv < ends[b, q]) & (kv <= ends[b, q] - 2) & (kv < ends[b, q] * 2)", "end[bq]"),
    ("doc[q] == doc[kv]", "residual"), ("bytes[q] >= bytes[kv]", "residual"), ("picture[q, kv]", "residual"),
    # prefixes
    ("(kv <= q) | (kv < prefix[b])", "end[bq]"), ("(kv < prefix[b]) | (q >= kv) | (kv == 0)", "end[bq]"),
    ("(kv <= q) | (q < prefix[b])", "end[bq]"), ("kv <= torch.maximum(q, prefix[b])", "end[bq]"),
    ("(q >= kv) | (h == 0)", "end[hq]"), ("(q >= kv) | local[h]", "end[hq]"), ("(q - kv <= 4) | local[h]", "start[hq]"),
    ("((q - kv <= windows[h]) | local[h]) & (q >= kv)", "lower 0, start[hq]"),
    # columns
    ("padding[b, kv]", "columns[bk]"), ("(q >= kv) & padding[b, kv]", "lower 0, columns[bk]"),
    ("(kv <= q) & padding[b, kv] & (kinds[kv] != 1)", "lower 0, columns[bk]"), ("bias[kv] > 0.25", "columns[k]"),
    ("padding[b, kv] | (kinds[kv] == 2)", "columns[bk]"), ("kv % 3 == 1", "columns[k]"),
    ("kv + 0.5 >= 3", "columns[k]"), ("padding[b, kv] | (q == kv)", "residual"),
    ("padding[b, kv] & padding[b, q]", "end[bq], columns[bk]"), ("local[h] & padding[b, kv]", "end[h], columns[bk]"),
    # where, clamps, absolute values, predicates as numbers
    ("torch.where(local[h], q - kv <= 4, True) & (q >= kv)", "lower 0, start[hq]"),
    ("torch.where(local[h], q, 2 * q) >= kv", "end[hq]"), ("torch.where(q >= 5, kv <= q, kv < 5)", "end[q]"),
    ("torch.where(kv < 5, q >= kv, False)", "end 4, lower 0"),
    ("torch.where(q >= kv, q - kv, 99) < 7", "lower 0, upper 6"), ("(q - kv).clamp(0, 9) <= 4", "upper 4"),
    ("(q - kv).clamp(max=3) >= 2", "lower -2"), ("(q - kv).clamp(-2, 2) <= 2", ""), ("kv <= q.clamp(min=4)", "end[q]"),
    ("torch.minimum(q, kv + 3) >= kv", "lower 0"), ("(q - kv).abs() <= 4", "lower 4, upper 4"),
    ("(kv - prefix[b]).abs() <= 3", "start[b], end[b]"), ("(kv >= 3).int() + (q >= kv).int() >= 2", "residual"),
    ("(q >= kv) == (kv < 99)", "residual"), ("(q >= kv) * kv <= 6", "residual"), ("(kv >= 3) != (kv < 3)", ""),
    # captured integers as widths and lengths
    ("(q - kv <= w) & (q >= kv)", "lower 0, upper 0 + terms"),
    ("(q - kv).abs() < w", "lower -1 + terms, upper -1 + terms"), ("kv < w + n", "end -1 + terms"),
    ("q // w == kv // w", "residual"), ("kv <= q + n", "lower 0 + terms"), ("q - kv <= windows[h]", "start[hq]"),
    ("(q - kv).abs() <= windows[h]", "start[hq], end[hq]"),
    # strictness, negation, floats
    ("2 * kv < q", "end[q]"), ("2 * kv <= q - 1", "end[q]"), ("~(2 * kv >= q)", "end[q]"),
    ("-3 * kv > -2 * q", "end[q]"), ("3 * q > 3 * kv + 1", "lower -1"), ("2 * (q - kv) >= -3", "lower 1"),
    ("q - kv < 2.5", "upper 2"), ("q - kv <= -0.5", "upper -1"), ("q - kv >= -2.0", "lower 2"),
    ("kv < 1e30", "columns[k]"), ("q * 0.5 >= kv", "residual"), ("kv > 4.0", "start -5"), ("4.5 > kv", "end 4"),
    ("(q - kv) / 2 <= 2", "residual"), ("kv.float() < lengths[b]", "columns[bk]"),
    # no limit: the ends of the dtypes
    ("kv < wide[b]", "end[b]"), ("kv <= wide[b]", "end[b]"), ("q - kv <= wide[b]", "start[bq]"),
    ("kv - wide[b] < q", "end[bq]"), ("kv // 4 <= wide[b]", "end[b]"), ("kv >= low[b]", "start[b]"),
    ("kv - q > low[b]", "start[bq]"), ("kv + 3 > low[b]", "start[b]"), ("kv < int_end[b]", "end[b]"),
    ("kv <= int_end[b]", "end[b]"), ("kv >= int_low[b]", "start[b]"), ("2 * kv < wide[b]", "end[b]"),
    ("kv < torch.where(local[h], wide[b], 4)", "end[bh]"), ("(kv < wide[b]) | (q >= kv)", "end[bq]"),
    # proved away
    ("(q >= kv) & (q - kv >= -5)", "lower 0"), ("(q >= kv) & ((q - kv).abs() < 4)", "lower 0, upper 3"),
    ("(q >= kv) & ((q >= kv) | picture[q, kv])", "lower 0"),
    ("(q >= kv) & ((q < kv) | padding[b, kv])", "lower 0, columns[bk]"), ("(q >= kv) | (q < kv) | picture[q, kv]", ""),
    ("(q >= kv) & (kv > q)", "lower 0, upper -1"), ("(kv >= 0) & (q + 2 * kv >= -1)", ""), ("(kv > 3) | (kv < 5)", ""),
    ("(kv > 5) | (kv < 5)", "residual"), ("(kv < 0) & picture[q, kv]", "end -1"),
    ("(kv < 7) & ((kv < 9) | (q >= kv))", "end 6"), ("(kv < 7) & ((kv > 9) | (q >= kv))", "end 6, lower 0"),
    # beside what stays
    ("(q >= kv) & ((q % 2) == (kv % 2)) & (q - kv < 9) & (q != 4)", "lower 0, upper 8, end[q], residual"),
    ("(kv < lengths[b]) & (doc[q] == doc[kv]) & padding[b, kv]", "end[b], columns[bk], residual"),
    ("near[q - kv + 21] & (q >= kv)", "lower 0, residual"), ("(q - kv) % 3 == 0", "residual"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "parts"), SOLVED, ids=[s for s, _ in SOLVED])
def test_what_masks_become(source: str, parts: str) -> None:
    assert described(assert_every_step_keeps(source, CAPTURED, SIZES)) == parts


@pytest.mark.parametrize("lengths", [(1, 1), (1, 40), (40, 1), (3, 50)], ids=str)
@pytest.mark.parametrize("source", [s for s, _ in SOLVED if not used(s, CAPTURED)])
def test_at_other_lengths(source: str, lengths: tuple[int, int]) -> None:
    assert_every_step_keeps(source, {}, (1, 2, *lengths))


ENDS = {
    torch.int32: [INT_MAX, INT_MIN, INT_MAX - 1, INT_MIN + 1, 0, 3, -1],
    torch.int64: [LONG_MAX, LONG_MIN, LONG_MAX - 1, 2**62, -(2**62), 2**31, -(2**33), 2, -1],
}


@pytest.mark.parametrize("dtype", ENDS, ids=str)
@pytest.mark.parametrize("compare", [">=", ">", "<=", "<"])
@pytest.mark.parametrize("side", ["kv", "kv - q", "q - kv", "2 * kv", "kv // 3", "-kv", "torch.maximum(kv, q)"])
def test_every_end_of_a_dtype_is_a_limit_or_none(side: str, compare: str, dtype: torch.dtype) -> None:
    captured = {"limit": integers(*ENDS[dtype], dtype=dtype)}
    rows = len(ENDS[dtype])
    for source in (f"{side} {compare} limit[q]", f"limit[q] {compare} {side}", f"~({side} {compare} limit[q])"):
        assert_every_step_keeps(source, captured, (1, 1, rows, rows + 2))


@pytest.mark.parametrize("compare", [">=", ">", "<=", "<"])
@pytest.mark.parametrize("side", ["kv", "kv - q", "2 * kv"])
def test_the_ends_of_a_dtype_in_what_stays(side: str, compare: str) -> None:
    captured = {"limit": integers(*ENDS[torch.int64]), "picture": CAPTURED["picture"]}
    rows = len(ENDS[torch.int64])
    for other in ("picture[q, kv]", f"({side} {compare} -3)", "(q == kv)"):
        assert_every_step_keeps(f"({side} {compare} limit[q]) | {other}", captured, (1, 1, rows, rows + 2))


def test_limits_are_clamped_to_the_keys() -> None:
    captured = used("kv < wide[b]", CAPTURED)
    _, (end,) = partition(normal("kv < wide[b]", captured))
    assert (end.limit, end.stored, end.dims) == (True, torch.int32, "b")


@pytest.mark.parametrize(
    ("terms", "constant", "limit"),
    [
        ({KV: 1}, -3, "3"), ({KV: -1}, 3, "4"), ({KV: 2, Q: -1}, 0, "-((q * -1) // 2)"),
        ({KV: -3, Q: 1}, 1, "((q + 1) // 3) + 1"),
    ],
)  # fmt: skip
def test_half_lines_are_limits(terms: dict[ir.Expr, int], constant: int, limit: str) -> None:
    half = Half(frozenset(terms.items()), constant)
    assert half.step == terms[KV]
    assert infix(simplify(limit_of(half))) == limit


def test_a_large_disjunction_stays_one_predicate() -> None:
    """Rather than all the clauses that it multiplies out to."""
    terms = [f"((q - kv == {3 * i}) & (kv % {i + 2} == 0))" for i in range(9)]
    solved = assert_every_step_keeps(" | ".join(terms), {}, SIZES)
    assert described(solved) == "residual"
    assert len(clauses(normal(" | ".join(terms)).mask)) <= MAX_CLAUSES


def test_trivial_masks() -> None:
    assert solve(TRUE) == Solved()
    assert solve(ir.FALSE).bounds == (Bound("end", -1),)
    for mask in (TRUE, ir.FALSE):
        assert torch.equal(visible(conjunction(solve(mask)), {}, SIZES), torch.full(SIZES, mask is TRUE))


def test_a_predicate_of_the_score_is_no_limit_of_a_row() -> None:
    """It cannot be computed outside."""
    of_score = make("ge", ir.SCORE, ir.const(0.0, ir.F32))
    solved = solve(simplify(make("or", of_score, make("ge", Q, KV))))
    assert (solved.ends, solved.bounds) == ((), ())
    assert ir.depends_on(solved.residual, ir.SCORE)


def test_terms_of_two_widths() -> None:
    """A 64-bit sum of captured numbers, one of them without a limit, does not wrap where it is solved."""
    captured = {"wide": integers(LONG_MAX, 4), "n": integers(3, 1, dtype=torch.int32)}
    sums = ("kv - n[b] <= wide[b]", "kv - q <= wide[b] - n[b]", "2 * kv + q <= wide[b]", "kv // 4 + n[b] <= wide[b]")
    for source in sums:
        assert_every_step_keeps(source, captured, (2, 1, 6, 9))
    assert [leaf.dtype for leaf in leaves(captured)] == [I64, I32]


BASE = 1_700_000_000_000_000_000  # nanoseconds, say
WIDE = {
    "most": integers(LONG_MAX, 3), "least": integers(LONG_MIN, 3), "offset": integers(5, 2), "times": integers(0, 4),
    "now": BASE + 1500 * torch.arange(6), "then": BASE + integers(0, 1000),
}  # fmt: skip


@pytest.mark.parametrize(
    "source",
    [
        "kv - offset[b] <= most[b]", "kv + offset[b] >= least[b]", "(kv + offset[b] >= least[b]) | (kv < q - 2)",
        "kv // 4 - offset[b] <= most[b]", "torch.where(kv >= 3, most[b], least[b]) > q",
        "torch.maximum(kv, most[b]) >= offset[b]", "torch.minimum(kv, least[b]) < offset[b]",
        "kv - q <= most[b] - offset[b]", "1000 * kv <= now[q] - then[b]", "2**41 * kv.long() <= offset[b] * 2**41",
        "kv == times[b] - least[b] + least[b]",
    ],
)  # fmt: skip
def test_sums_of_64_bits_do_not_wrap(source: str) -> None:
    """One of them without a limit, or both large and their difference not."""
    assert_every_step_keeps(source, WIDE, (2, 1, 6, 9))
