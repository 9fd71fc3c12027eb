"""Random masks as people write them, and score_mods that mask, as Python source over torch ops.

Knows nothing of the package under test. The captured tensors serve every size of the axes up to a limit.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from .generate import Mod

Choose = Callable[[Sequence[Any]], Any]
Forms = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
BATCH, HEADS, LIMIT = 2, 2, 8
SIZES = ((BATCH, HEADS, 5, 7), (BATCH, HEADS, 6, 6), (BATCH, HEADS, 7, 4))
INTS, FLOATS = ("n0", "w0"), ("x0",)  # of these, the functions capture the number, not the tensor


def tensors(heads: int, limit: int) -> dict[str, torch.Tensor]:
    """Every tensor that a source may name, for a batch of two and axes of at most `limit`."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=random).to(dtype)

    cuts = [limit * 3 // 8, limit * 5 // 8]
    doc = torch.bucketize(torch.arange(limit), torch.tensor(cuts), right=True)
    return {
        "slopes": normal(heads) * 8 / limit, "scales": normal(heads), "both": normal(BATCH, heads),
        "bias": normal(BATCH, limit),
        "pairs": normal(limit, limit), "soft": normal(limit, limit).bfloat16(), "table": normal(heads, 2 * limit),
        "lengths": torch.tensor([cuts[1], limit // 4]), "offset": torch.tensor([2, -1]), "doc": doc,
        "limits": torch.tensor([3, 2**62]), "windows": torch.arange(1, heads + 1, dtype=torch.int32) * limit // 6,
        "offsets": torch.tensor([0, *cuts, limit], dtype=torch.int32), "kinds": doc.flip(0).to(torch.uint8),
        "docs": integers(0, 3, BATCH, limit, dtype=torch.int32), "starts": integers(-1, cuts[1], BATCH, limit),
        "start": integers(-1, cuts[1], limit, dtype=torch.int32), "padding": integers(0, 3, BATCH, limit) > 0,
        "local": torch.arange(heads) % 2 == 0, "mask": integers(0, 2, limit, limit) > 0,
        "masks": integers(0, 2, heads, limit, limit) > 0, "near": integers(0, 3, 2 * limit) > 0,
        "n0": torch.tensor(limit // 4), "w0": torch.tensor(limit // 2), "x0": torch.tensor(0.75),
    }  # fmt: skip


CAPTURED = tensors(HEADS, LIMIT)


class MaskMod(Mod):
    @property
    def captured(self) -> dict[str, torch.Tensor]:
        return CAPTURED


# {p} is a predicate, {s} a score, {i} a position or a distance, {o} a comparison by order, {e} == or !=,
# {n} an integer, {m} a positive one, {c} a float, {l} the limit of the axes.
FORMS: Forms = {
    "p": (
        (
            "(q >= kv)", "(kv <= q)", "(q {o} kv)", "(q - kv {o} {n})", "(kv - q {o} {n})", "(q {o} kv + {n})",
            "(q + {n} {o} kv)", "({n} {o} q - kv)", "(kv {o} {n})", "(q {o} {n})", "({m} * (q - kv) {o} {n})",
            "({m} * q - {m} * kv {o} {n})", "({i} {o} {n})", "({i} {o} {i})", "({n} {o} {i})", "({i} {e} {n})",
            "(torch.abs(q - kv) {o} {n})", "((q - kv + {n}).abs() {o} {n})", "({n} {o} (kv - q).abs())",
            "((q - kv) * (q - kv) {o} {m})", "(q - kv + offset[b] {o} {n})", "(q + offset[b] {o} kv)",
            "(kv - offset[b] {o} q + {n})", "(q - kv {o} w0)", "(kv {o} n0)", "(q + n0 {o} kv + {n})",
            "(w0 {o} torch.abs(q - kv))", "(kv // w0 {e} q // w0)", "(q >> {m} {e} kv >> {m})", "((q ^ kv) {o} {n})",
            "((q - kv) & {m} == 0)", "((kinds[q] & kinds[kv]) != 0)", "(q - kv {o} {c})", "(q * 0.5 {o} kv)",
            "((q - kv) / {m} {o} {c})", "(slopes[h] * (q - kv) {o} {c})", "(q.float() {o} kv.float())",
            "((q - kv).to(torch.float32) {o} x0)", "(q / {m} {o} kv / {m})", "(bias[b, kv] {o} {c})",
            "(table[h, q - kv + {l}] {o} {c})", "(q // {m} {o} kv // {m})", "(q // {m} == kv // {m})",
            "(q // {m} == kv // {m} - 1)", "(q % {m} {o} {n})", "((q - kv) % {m} == {n})", "((kv - q) % {m} == 0)",
            "((q - kv) // {m} {o} {n})", "(torch.div(q - kv, {m}, rounding_mode='floor') {o} {n})",
            "(q % {m} {e} kv % {m})", "((q - kv) % -3 {o} {n})", "((q - kv) // -2 {o} {n})", "(kv {o} lengths[b])",
            "(q {o} lengths[b])", "(q - kv {o} limits[b])", "(kv {o} limits[b] - 1)", "(q - kv {o} windows[h])",
            "(kv {o} lengths[b] + windows[h])", "(both[b, h] {o} {c})",
            "(torch.abs(q - kv) {o} windows[h])", "(kv >= offsets[doc[q]])", "(kv < offsets[doc[q] + 1])",
            "(kv - offsets[doc[kv]] {o} q - offsets[doc[q]])", "(doc[q] {e} doc[kv])", "(doc[q] {o} doc[kv])",
            "(docs[b, q] == docs[b, kv])", "(docs[b, q] {o} docs[b, kv])", "(kinds[q] {e} kinds[kv])",
            "(kinds[kv] {e} {m})", "(kinds[q] {o} doc[kv])", "padding[b, kv]", "padding[b, q]", "mask[q, kv]",
            "masks[h, q, kv]", "near[q - kv + {l}]", "local[h]", "(start[q] <= kv)", "(starts[b, q] {o} kv)",
            "(kv - start[q] {o} {n})", "(h {e} 0)", "(b + h {o} {n})", "(doc[q] {o} {n})",
        ),
        (
            "({p} & {p})", "({p} & {p})", "({p} & {p} & {p})", "({p} | {p})", "({p} | {p})", "(~{p})", "({p} ^ {p})",
            "torch.logical_and({p}, {p})", "torch.logical_or({p}, {p})", "torch.logical_not({p})", "{p}.logical_not()",
            "torch.logical_xor({p}, {p})", "torch.where({p}, {p}, {p})", "({p} == {p})", "({p} != {p})",
            "(torch.where({p}, {n}, {n}) > 0)", "(torch.where({p}, {i}, {i}) {o} {n})",
            "(q.new_ones((), dtype=torch.bool) & {p} & {p})", "(kv.new_zeros((), dtype=torch.bool) | {p})",
            "((q.new_ones((), dtype=torch.bool) & (kv <= q)) & padding[b, kv] & {p})",
            "({p}.to(torch.int32) + {p}.to(torch.int32) >= {m})", "({p} & True)", "({p} | False)",
            "((kv <= q) & (q - kv < {m}) & {p})", "(({p} & (kv <= q)) | (kv < {n}))",
            "torch.where(local[h], q - kv <= {n}, {p})", "torch.where(kv < lengths[b], {p}, {p})",
            "({p} * {i} {o} {n})",
        ),
    ),
    "i": (
        (
            "q", "kv", "(q - kv)", "(kv - q)", "((q // {m} + 1) * {m} + q % {m})", "(kv % {m} + kv // {m} * {m})",
            "(q - kv + {n})", "(q - kv + offset[b])", "({n} - kv + q)",
        ),
        (
            "(q - kv).clamp({n}, {n})", "torch.clamp(kv - q, min={n})", "(q - kv).clamp(max={n})",
            "torch.clamp(q + {n}, max=n0)", "torch.minimum({i}, {i})", "torch.maximum({i}, {i})", "{i}.abs()",
            "torch.maximum({i}, start[q])", "torch.minimum({i}, lengths[b])", "({i} + {i})", "({i} - {i})",
            "({m} * {i})", "-{i}", "({i} - offsets[doc[q]])", "{i}.to(torch.int64)", "{i}.clamp(min=windows[h])",
            "torch.where({p}, {i}, {i})", "({i} % {m})", "({i} // {m})",
            "({i} & {n})", "({i} & {i})", "({i} | {n})", "({i} ^ {m})", "(~{i})", "({i} >> {m})", "({i} << {m})",
        ),
    ),
    "s": (
        (
            "score", "score", "(20 * torch.tanh(score / 20))", "(score + slopes[h] * (kv - q))", "(score * scales[h])",
            "(score - torch.abs(q - kv) * 0.125)", "(score + bias[b, kv])",
            "(score * both[b, h])", "(score + both[b, h] * (q - kv) / {l})", "(score + bias[b, q] * x0)",
            "(score + table[h, q - kv + {l}])", "(score + pairs[q, kv])", "(score + soft[q, kv])",
            "(score + (kv - q) * x0 / {l})",
        ),
        (
            "({s} * 0.5)", "({s} + {c})", "torch.where({p}, {s}, {s} * 0.5)", "({s} * torch.sigmoid({s}))",
            "F.softplus({s})", "({s} * torch.exp(-torch.abs(q - kv) / {m}))", "({s} + torch.log(1 + (q - kv).abs()))",
            "({s} + {p} * 1.0)", "torch.where({p}, {s}, -7.0)", "({s} + torch.where({p}, {c}, {c}))", "torch.sin({s})",
            "({s} * {s})", "(-{s})", "torch.where({p}, {s} + {c}, {s})",
        ),
    ),
}  # fmt: skip
MASKED = (
    "torch.where({p}, {s}, -inf)", "torch.where({p}, torch.where({p}, {s}, -inf), -inf)", "{s}.masked_fill({p}, -inf)",
    "torch.where({p}, -inf, {s})", "({s} + torch.where({p}, 0.0, -inf))", "({s} + torch.where({p}, -inf, 0.0))",
    "torch.where({p}, torch.where({p}, {s}, {s}), float('-inf'))", "torch.where({p}, {s}, torch.where({p}, {s}, -inf))",
    "{s}.masked_fill({p}, -inf).masked_fill(~{p}, float('-inf'))",
    "torch.where({p}, {s}, torch.full_like(score, -inf))",
    "(torch.where({p}, {s}, -inf) * 0.5)", "(torch.where({p}, {s}, -inf) + slopes[h] * (q - kv))",
)  # fmt: skip
NUMBERS: dict[str, Sequence[Any]] = {
    "o": (">=", ">", "<=", "<"), "e": ("==", "!="), "n": range(-3, 8), "m": range(1, 5),
    "c": tuple(n / 4 for n in range(-10, 11)), "l": (LIMIT,),
}  # fmt: skip
INNERMOST = {"p": "(q >= kv)", "i": "(q - kv)", "s": "score"}
WHOLE = ("{p}", "{p}", "({p} & {p})", "((q >= kv) & {p})", "((kv <= q) & (q - kv < {m}) & {p})", "((q >= kv) | {p})")


class Sources:
    """Writes random sources. `choose` picks one of a sequence; `numbers` replaces some of NUMBERS, `forms` FORMS."""

    def __init__(
        self, choose: Choose, numbers: dict[str, Sequence[Any]] | None = None, forms: Forms | None = None
    ) -> None:
        self.choose, self.numbers, self.forms = choose, {**NUMBERS, **(numbers or {})}, forms or FORMS

    def mask(self, depth: int) -> str:
        return self._fill(self.choose(WHOLE), depth)

    def score(self, depth: int) -> str:
        """Half of them mask, too; all are smooth where they are visible."""
        return self._fill(self.choose(MASKED) if self.choose((False, True)) else "{s}", depth)

    def of(self, form: str) -> str:
        """The form, with whatever is simplest in its placeholders."""
        return self._fill(form, 0)

    def _fill(self, form: str, depth: int) -> str:
        """`form` with every placeholder replaced by a random source of its type."""
        return re.sub(r"\{(\w)\}", lambda found: self._source(found[1], depth), form)

    def _source(self, kind: str, depth: int) -> str:
        if kind in self.numbers:
            value = self.choose(self.numbers[kind])
            return value if isinstance(value, str) else f"({value!r})" if value < 0 else repr(value)
        leaves, ops = self.forms[kind]
        if depth <= -2:  # leaves may hold leaves, but not for ever
            return INNERMOST[kind]
        atomic = depth <= 0 or self.choose(range(3)) == 0
        return self._fill(self.choose(leaves if atomic else ops), depth - 1)


@st.composite
def masks(draw: Callable[..., Any], depth: int = 2) -> Mod:
    return MaskMod(Sources(lambda options: draw(st.sampled_from(options))).mask(depth), False)


@st.composite
def masked_scores(draw: Callable[..., Any], depth: int = 1) -> Mod:
    return MaskMod(Sources(lambda options: draw(st.sampled_from(options))).score(depth), True)
