"""Compares the blocks that a BlockMask lists with the mask program: the BlockMask contract.

block_mask_contract.py says when to compare. Stock flex_attention computes nothing in an omitted block and no mask in a
"full" one; the plans compute the mask everywhere. Both agree if no omitted block has a visible pair and no full one a
hidden pair; blocks that are listed needlessly do no harm.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cudnn_flex_compile.scoremod.interpret import visible_rows
from cudnn_flex_compile.scoremod.ir import Program
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.masks.linear import Linear
from cudnn_flex_compile.scoremod.saturate import INT64_LIMIT


def agree(
    blocks: Sequence[Tensor], operands: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor],
    program: Program, sizes: Sequence[int], block_sizes: Sequence[int],
) -> Tensor:  # fmt: skip
    """Whether blocks and mask agree, as a boolean scalar on the device of the blocks."""
    device, block = blocks[0].device, clipped(block_sizes, sizes)
    limits = row_limits(program, operands, ints, sizes, device)
    if limits is not None:
        return _agree(blocks, [limits.blocks(*block)], sizes, block)
    pairs = visible_rows(program.mask, operands, ints, floats, sizes, block[0], device)
    return _agree(blocks, _by_pairs(pairs, *block), sizes, block)


def clipped(block_sizes: Sequence[int], sizes: Sequence[int]) -> tuple[int, int]:
    """Block sizes no larger than the lengths."""
    q_block, kv_block = (int(min(b, n)) for b, n in zip(block_sizes, sizes[2:], strict=True))
    return q_block, kv_block


def _agree(
    blocks: Sequence[Tensor], found: Iterable["Blocks"], sizes: Sequence[int], block: tuple[int, int]
) -> Tensor:
    return well_formed(blocks, sizes, block) & covered(blocks, found, sizes, block)


def well_formed(blocks: Sequence[Tensor], sizes: Sequence[int], block: tuple[int, int]) -> Tensor:
    """Whether each block is listed once at most, and the lists by rows and by columns have the same blocks.

    Stock counts the pairs of a block twice that is listed twice, and computes the gradients of keys and values by the
    lists of columns.
    """
    rows, columns = _extent(sizes, block)
    partial, full = by_kind(blocks, sizes, block)
    transposed = blocks[4:] if len(blocks) == 8 else blocks[2:]
    if partial.shape[2] < rows or any(t.shape[2] < columns for t in transposed):  # made for shorter lengths
        return torch.zeros((), dtype=torch.bool, device=partial.device)
    good = ~(partial & full).any()
    pairs = [blocks[i : i + 2] for i in range(0, len(blocks) - len(transposed), 2)]
    for (count, indices), mine in zip(pairs, (partial, full), strict=False):
        valid = torch.arange(indices.shape[-1], device=indices.device) < count.unsqueeze(-1)
        inside = valid & (indices < columns)  # a BlockMask that was cropped lists blocks beyond the end, which hide all
        good &= (mine[:, :, :rows].sum(-1) == inside[:, :, :rows].sum(-1)).all()
    for mine, pair in zip((partial, full), (transposed[:2], transposed[2:]), strict=True):
        if len(pair) == 2:
            good &= (listed(pair[0], pair[1], rows).transpose(-2, -1)[..., :columns] == mine[:, :, :rows]).all()
    return good


def covered(
    blocks: Sequence[Tensor], found: Iterable["Blocks"], sizes: Sequence[int], block: tuple[int, int]
) -> Tensor:
    """Whether no visible pair is in a block that is not listed, and no hidden one in a full block."""
    partial, full = by_kind(blocks, sizes, block)
    columns = _extent(sizes, block)[1]
    good = torch.ones((), dtype=torch.bool, device=partial.device)
    for start, some, every in found:
        here = slice(start // block[0], start // block[0] + some.shape[-2])
        near, whole = partial[:, :, here, :columns], full[:, :, here, :columns]
        if near.shape[2] < some.shape[-2]:  # made for shorter lengths
            return torch.zeros_like(good)
        good &= ~((some & ~near & ~whole) | (whole & ~every)).any()
    return good


def by_kind(blocks: Sequence[Tensor], sizes: Sequence[int], block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Whether each block is partial, and whether it is full, [B or 1, H or 1, rows, columns] of blocks."""
    columns = _extent(sizes, block)[1]
    partial = listed(blocks[0], blocks[1], columns)
    return partial, listed(blocks[2], blocks[3], columns) if len(blocks) == 8 else torch.zeros_like(partial)


def _extent(sizes: Sequence[int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-sizes[2] // block[0]), -(-sizes[3] // block[1])


Blocks = tuple[int, Tensor, Tensor]  # the first row; per block, whether it has a visible pair, and a hidden one


def _by_pairs(chunks: Iterator[tuple[int, Tensor]], q_block: int, kv_block: int) -> Iterator[Blocks]:
    for start, visible in chunks:
        some = _per_block(visible, q_block, kv_block, fill=False).flatten(-2).any(-1)
        yield start, some, _per_block(visible, q_block, kv_block, fill=True).flatten(-2).all(-1)


@dataclass(frozen=True, slots=True)
class RowLimits:
    """A mask as start <= kv < end for each row, among the keys that are visible at all.

    Attributes:
        start, end: [B or 1, H or 1, Sq], int32, in [0, Skv].
        counts: [B or 1, H or 1, Skv + 1]: how many keys before each position are visible.
    """

    start: Tensor
    end: Tensor
    counts: Tensor

    def blocks(self, q_block: int, kv_block: int) -> Blocks:
        """All blocks, in time and memory that grow as Sq x Skv / kv_block."""
        low, high = _edges(self.counts.shape[-1] - 1, kv_block, self.start.device)
        start = torch.maximum(self.start.unsqueeze(-1), low)
        end = torch.maximum(torch.minimum(self.end.unsqueeze(-1), high), start)
        return _of_counts(self._counted(end) - self._counted(start), high - low, q_block)

    def _counted(self, position: Tensor) -> Tensor:
        batch, heads = torch.broadcast_shapes(position.shape[:2], self.counts.shape[:2])
        counts = self.counts.expand(batch, heads, -1)
        return counts.gather(2, position.expand(batch, heads, -1, -1).flatten(2).long()).view(
            batch, heads, *position.shape[2:]
        )  # fmt: skip


def _edges(length: int, kv_block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first key of each block, and the key after its last."""
    edges = torch.arange(0, length + kv_block, kv_block, dtype=torch.int32, device=device).clamp(max=length)
    return edges[:-1], edges[1:]


def _of_counts(seen: Tensor, size: Tensor, q_block: int) -> Blocks:
    """The blocks, from the number of keys of each block that each row sees, [B or 1, H or 1, Sq, blocks], and the
    number of keys that it has.
    """
    padded = -seen.shape[-2] % q_block
    some, every = (
        torch.nn.functional.pad(t, (0, 0, 0, padded), value=fill).unflatten(2, (-1, q_block))
        for t, fill in ((seen > 0, False), (seen == size, True))
    )
    return 0, some.any(3), every.all(3)


def row_limits(
    program: Program, operands: Sequence[Tensor], ints: Sequence[int], sizes: Sequence[int], device: torch.device
) -> RowLimits | None:
    """The mask's rows as intervals, if it is made of bounds and hidden columns."""
    form = split(program.mask)
    if not form.rows_are_intervals:
        return None
    rows = torch.arange(sizes[2], dtype=torch.int64, device=device)[None, None]
    start, end = torch.zeros_like(rows), torch.full_like(rows, sizes[3])
    for bound in form.bounds:
        limit = _values(bound.limit(), rows, operands, ints)
        if bound.at_most:
            end = torch.minimum(end, limit + 1)
        else:
            start = torch.maximum(start, limit)
    visible = torch.ones(1, 1, sizes[3], dtype=torch.bool, device=device)
    for bias in form.biases:
        visible = visible & (operands[int(bias.value or 0)][:, :, 0] >= 0)
    counts = torch.nn.functional.pad(visible.to(torch.int32).cumsum(-1, dtype=torch.int32), (1, 0))
    start, end = (t.clamp(0, sizes[3]).to(torch.int32).expand(*t.shape[:2], sizes[2]) for t in (start, end))
    return RowLimits(start, end, counts)


def _values(limit: Linear, rows: Tensor, operands: Sequence[Tensor], ints: Sequence[int]) -> Tensor:
    """A bound's limit of each query row, [B or 1, H or 1, Sq or 1]."""
    scalars = [factor * ints[int(atom.value or 0)] for atom, factor in limit.factors.items() if atom.kind == "scalar"]
    values = torch.zeros_like(rows) + limit.constant + max(-INT64_LIMIT, min(sum(scalars), INT64_LIMIT))
    for atom, factor in limit.factors.items():
        if atom.kind == "index":
            values = values + factor * rows
        elif atom.kind == "operand":
            values = values + factor * operands[int(atom.value or 0)][..., 0].long()
    return values


COMPARED = 2**24  # up to so many comparisons of indices with columns are faster than zeros and a scatter


def listed(count: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Whether each column is listed, [B, H, rows, columns], from counts [B, H, rows] and indices [B, H, rows, n]."""
    valid = torch.arange(indices.shape[-1], device=indices.device) < count.unsqueeze(-1)
    if valid.numel() * columns <= COMPARED:
        column = torch.arange(columns, dtype=indices.dtype, device=indices.device).unsqueeze(-1)
        return ((indices.unsqueeze(-2) == column) & valid.unsqueeze(-2)).any(-1)
    width = max(columns, indices.shape[-1])
    dense = torch.zeros((*count.shape, width + 1), dtype=torch.bool, device=indices.device)
    there = valid & (indices >= 0) & (indices < width)
    return dense.scatter(-1, torch.where(there, indices.long(), width), True)[..., :columns]


def _per_block(mask: Tensor, q_block: int, kv_block: int, fill: bool) -> Tensor:
    """[B, H, R, C] -> [B, H, R / q_block, C / kv_block, q_block, kv_block]; entries beyond the ends are `fill`."""
    pad = -mask.shape[-1] % kv_block, -mask.shape[-2] % q_block
    padded = torch.nn.functional.pad(mask, (0, pad[0], 0, pad[1]), value=fill)
    blocked = padded.unflatten(-1, (-1, kv_block)).unflatten(2, (-1, q_block))
    return blocked.transpose(3, 4)
