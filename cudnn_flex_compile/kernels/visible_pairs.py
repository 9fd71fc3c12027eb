"""Evaluates which pairs of a call are visible, by its mask and by the blocks of its BlockMask, block by block of rows.

Tables of endpoints are made from it (row_tables.py). The meaning is stock flex_attention's: a pair is visible if its
block is listed, and is full or the mask_mod holds, and if the score_mod does not hide it, in blocks of any kind.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cudnn_flex_compile.kernels.block_mask import by_kind, clipped
from cudnn_flex_compile.kernels.row_runs import Parts, parts_in_blocks, parts_of
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import CHUNK, environment, evaluate
from cudnn_flex_compile.scoremod.ir import F32, I32, TRUE, Expr
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.saturate import exact
from cudnn_flex_compile.scoremod.simplify import normalize
from cudnn_flex_compile.scoremod.text import parse, text


@dataclass(frozen=True, slots=True)
class Mask:
    """The mask of a call.

    Attributes:
        own: the mask_mod.
        always: the pairs that the score_mod leaves visible.
        parts, own_parts: both together, and the first, as parts for runs of rows (row_runs.py), if they have any.
        in_blocks: each, as parts for a run of a row in each block of keys, if both have any.
        reads_ints, reads_floats: whether it reads scalars.
    """

    own: Expr
    always: Expr
    parts: Parts | None
    own_parts: Parts | None
    in_blocks: tuple[Parts, Parts] | None
    reads_ints: bool
    reads_floats: bool


@functools.lru_cache(256)
def mask_of(program: str) -> Mask:
    """The mask of a text that `text_of` made, or of a program that hides nothing by its score."""
    parsed = parse(program)
    own, always = parsed.mask, parsed.score.args[0] if parsed.score.kind == "where" else TRUE
    leaves = list(ir.walk(own, always))
    kinds = {n.dtype for n in leaves if n.kind == "scalar"}
    parts = own_parts = in_blocks = None
    if not any(n.kind == "operand" for n in leaves):
        both, *each = (normalize(ir.program(mask=m)).mask for m in (make("and", own, always), own, always))
        parts, own_parts = parts_of(both), parts_of(each[0])
        found = [p for p in map(parts_in_blocks, each) if p is not None]
        in_blocks = (found[0], found[1]) if len(found) == 2 else None
    return Mask(own, always, parts, own_parts, in_blocks, I32 in kinds, F32 in kinds)


def text_of(own: Expr, always: Expr) -> str:
    """The text of a mask, over captures and scalars by position."""
    hidden = ir.const(float("-inf"), F32)
    return text(ir.program(ir.SCORE if always is TRUE else make("where", always, ir.SCORE, hidden), own))


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of one call.

    Attributes:
        program: the text of its mask (`text_of`).
        captured, operands, ints, floats: the leaves that the mask reads, by position.
        sizes: the sizes of the axes b, h, q and k.
        blocks, block_sizes: the BlockMask's, as in stock.Stock; no blocks without one.
    """

    program: str
    captured: Sequence[Tensor]
    operands: Sequence[Tensor]
    ints: Sequence[int]
    floats: Sequence[Tensor]
    sizes: Sequence[int]
    blocks: Sequence[Tensor]
    block_sizes: Sequence[int]
    device: torch.device

    @property
    def mask(self) -> Mask:
        return mask_of(self.program)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the pairs depend on, without operands, which have no version of their own."""
        return (*self.blocks, *self.captured)

    @property
    def block(self) -> tuple[int, int]:
        return clipped(self.block_sizes, self.sizes)

    @property
    def axes(self) -> tuple[int, int]:
        """The number of batch entries and of heads that differ; 1 where all are the same."""
        batch, heads = (
            n if named else listed for named, n, listed in zip(self._named, self.sizes, self._listed, strict=False)
        )
        return batch, heads

    @property
    def count(self) -> int:
        """The number of pairs that differ."""
        return math.prod(self.axes) * self.sizes[2] * self.sizes[3]

    @property
    def _named(self) -> tuple[bool, bool]:
        """Whether the mask names the axes b and h."""
        named = {*ir.axes_of(self.mask.own), *ir.axes_of(self.mask.always)}
        return "b" in named, "h" in named

    @property
    def _listed(self) -> tuple[int, int]:
        """The number of batch entries and of heads that the BlockMask has."""
        batch, heads = [max(sizes) for sizes in zip(*(t.shape[:2] for t in self.blocks), strict=True)] or [1, 1]
        return batch, heads

    def by_first_blocks(self) -> "Pairs | None":
        """The same pairs where the blocks of all batch entries and heads, of which the mask depends on none, are those
        of the first (`blocks_repeat`). None where there are no such blocks.
        """
        cut = [not named and listed > 1 for named, listed in zip(self._named, self._listed, strict=True)]
        if not any(cut):
            return None
        batch, heads = (slice(1) if only_first else slice(None) for only_first in cut)
        return replace(self, blocks=[t[batch, heads] for t in self.blocks])

    def blocks_repeat(self) -> Tensor:
        """Whether the blocks of `by_first_blocks` are those of all, a boolean scalar."""
        first = self.by_first_blocks()
        assert first is not None
        each = by_kind(self.blocks, self.sizes, self.block), by_kind(first.blocks, self.sizes, self.block)
        return torch.stack([(every == one).all() for every, one in zip(*each, strict=True)]).all()

    def chunks(self, most: int) -> Iterator[slice]:
        """The slices of rows that are evaluated together, of `most` pairs."""
        batch, heads = self.axes
        step = max(1, most // max(1, batch * heads * self.sizes[3]))
        return (slice(start, min(start + step, self.sizes[2])) for start in range(0, self.sizes[2], step))

    def visible(self) -> Iterator[tuple[int, Tensor]]:
        """Yields the first row of each chunk, and whether its pairs are visible, [B or 1, H or 1, R, Skv]."""
        show = self._shower()
        return ((rows.start, show(rows, 0)) for rows in self.chunks(CHUNK))

    def with_previous(self, most: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields whether the pairs of each chunk, of `most` pairs, are visible, and whether the pairs at the key before
        are.
        """
        show = self._shower()
        return ((show(rows, 0), show(rows, 1)) for rows in self.chunks(most))

    def _shower(self) -> Any:
        kinds = by_kind(self.blocks, self.sizes, self.block) if self.blocks else None
        numbers = dict(enumerate(exact((self.mask.own, self.mask.always), self.ints)))
        floats = {i: float(f) for i, f in enumerate(self.floats)}
        span = [torch.arange(n, dtype=torch.int32, device=self.device) for n in self.sizes[:3]]
        nothing = torch.zeros((1, 1, 1, 1), device=self.device)

        def show(rows: slice, shift: int) -> Tensor:
            places = (torch.arange(self.sizes[3], dtype=torch.int32, device=self.device) - shift).clamp(min=0)
            q = span[2][rows]
            near = {i: _near(t, rows, places) for i, t in enumerate(self.operands)}
            indices = {
                "b": span[0].view(-1, 1, 1, 1), "h": span[1].view(-1, 1, 1), "q": q.view(-1, 1), "k": places,
            }  # fmt: skip
            leaf = environment(nothing, indices, near, numbers, floats, captured=self.captured)
            found = evaluate(self.mask.own, leaf)
            if kinds is not None:
                partial, full = (self._at_pairs(kind, rows, shift) for kind in kinds)
                found = (found & partial) | full
            if self.mask.always is not TRUE:
                found = found & evaluate(self.mask.always, leaf)
            return found.expand(*self.axes, len(range(self.sizes[2])[rows]), self.sizes[3])

        return show


    def _at_pairs(self, kind: Tensor, rows: slice, shift: int) -> Tensor:
        """Expands blocks to pairs, by views: Inductor fuses no gather of them."""
        (q_block, kv_block), first = self.block, rows.start // self.block[0]
        near = kind[:, :, first : -(-rows.stop // q_block)]
        wide = near.unsqueeze(-1).expand(*near.shape, kv_block).flatten(-2)[..., : self.sizes[3]]
        tall = wide.unsqueeze(3).expand(*wide.shape[:3], q_block, -1).flatten(2, 3)
        found = tall[:, :, rows.start - first * q_block : rows.stop - first * q_block]
        return torch.nn.functional.pad(found[..., :-1], (1, 0)) if shift else found


def _near(operand: Tensor, rows: slice, places: Tensor) -> Tensor:
    operand = operand[:, :, rows] if operand.shape[2] > 1 else operand
    return operand.index_select(3, places) if operand.shape[3] > 1 else operand
