"""Finds one run of visible keys for each row of a mask, in time and memory that grow with the lengths, not with pairs.

row_tables.py makes tables of endpoints from the runs. A mask can be described so if it is made of bounds, of equalities
between a value of the row and a value of the key (document ids), and of conditions of the keys alone (padding). Whether
each row sees one run depends on the data, and is part of the result.

A mask that reads keys at `order[kv]` alone, as that of torch's context parallel does, is described for keys in their
first order. Where a block of keys has successive ones of that order, each row sees one run in the block.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cudnn_flex_compile.kernels.block_mask import covered, row_limits
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.hoisting import computed
from cudnn_flex_compile.scoremod.ir import F32, I32, I64, TRUE, Expr, Program
from cudnn_flex_compile.scoremod.masks.form import conjuncts, split
from cudnn_flex_compile.scoremod.masks.linear import KV
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.partition import Hoisted, partition
from cudnn_flex_compile.scoremod.simplify import normalize


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs of all rows: start <= kv < end.

    Attributes:
        start, end: [B or 1, H or 1, Sq], int32, in [0, Skv]; both Skv in a row that sees nothing.
        right: whether the runs are the mask, a boolean scalar.
    """

    start: Tensor
    end: Tensor
    right: Tensor


@dataclass(frozen=True, slots=True)
class Parts:
    """The conjuncts of a mask.

    Attributes:
        equal: pairs of values, of the row and of the key, that must be equal.
        program, hoisted: the program of all other conjuncts, and its operands.
        order: the place in their first order of the keys of the call, for which the parts are; None for the call's own.
    """

    equal: tuple[tuple[Hoisted, Hoisted], ...]
    program: Program
    hoisted: tuple[Hoisted, ...]
    order: Hoisted | None = None


@functools.lru_cache(256)
def parts_of(mask: Expr) -> Parts | None:
    """The parts of a simplified mask over captures; None if it has other conjuncts, too."""
    equal: list[tuple[Hoisted, Hoisted]] = []
    rest = TRUE
    for term in conjuncts(mask):
        sides = _sides(term)
        if sides is None:
            rest = make("and", rest, term)
        else:
            equal.append(sides)
    program, hoisted = partition(normalize(ir.program(mask=rest)))
    if not split(program.mask).rows_are_intervals:
        return None
    return Parts(tuple(equal), program, tuple(hoisted))


@functools.lru_cache(256)
def parts_in_blocks(mask: Expr) -> Parts | None:
    """The parts of a simplified mask over captures, in which each block of keys may be a run of another order."""
    plain, order = parts_of(mask), _order(mask)
    if order is None or (plain is not None and not _is_index(order, mask)):
        return plain
    parts = parts_of(normalize(ir.program(mask=ir.rebuild(mask, {order: ir.cast(KV, order.dtype)}))).mask)
    return plain if parts is None else replace(parts, order=Hoisted(order, torch.int64))


def _order(mask: Expr) -> Expr | None:
    """The integer of a captured tensor, such as order[kv], through which alone the mask depends on keys."""
    for node in ir.walk(mask):
        if node.kind != "gather" or node.dtype not in (I32, I64) or {"q", "k"} & set(ir.axes_of(node)) != {"k"}:
            continue
        if "k" not in ir.axes_of(ir.rebuild(mask, {node: ir.const(0, node.dtype)})):
            return node
    return None


def _is_index(order: Expr, mask: Expr) -> bool:
    return any(node.kind == "gather" and order in node.args[1:] for node in ir.walk(mask))


def _sides(term: Expr) -> tuple[Hoisted, Hoisted] | None:
    """The sides of an equality: the row's first, then the key's."""
    if term.kind != "eq" or any(arg.dtype == F32 for arg in term.args):
        return None
    row, key = sorted(term.args, key=lambda arg: "k" in ir.axes_of(arg))
    if {"k"} & set(ir.axes_of(row)) or "q" in ir.axes_of(key) or "k" not in ir.axes_of(key):
        return None
    of_row, of_key = (Hoisted(arg, torch.int64) for arg in (row, key))
    return of_row, of_key


def runs_of(
    parts: Parts, captured: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor], sizes: Sequence[int],
    device: torch.device,
) -> Runs:  # fmt: skip
    """The runs of a mask's rows, of keys in the parts' order."""

    def operand(hoisted: Hoisted) -> Tensor:
        return _computed(hoisted, captured, ints, floats, sizes, device)

    operands = [operand(hoisted) for hoisted in parts.hoisted]
    limits = row_limits(parts.program, operands, ints, sizes, device)
    assert limits is not None
    start, end = limits.start, limits.end
    right = torch.ones((), dtype=torch.bool, device=device)
    found = [_run_of_columns(limits.counts)] if split(parts.program.mask).biases else []
    found += [_run_of_equals(operand(row), operand(key)) for row, key in parts.equal]
    for first, last, contiguous in found:
        start, end = torch.maximum(start, first), torch.minimum(end, last)
        right = right & contiguous
    empty = start >= end
    return Runs(torch.where(empty, sizes[3], start), torch.where(empty, sizes[3], end), right)


def _computed(
    hoisted: Hoisted, captured: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor], sizes: Sequence[int],
    device: torch.device,
) -> Tensor:  # fmt: skip
    def value(leaf: Expr) -> Any:
        source: Sequence[Any] = captured if leaf.kind == "capture" else ints if leaf.dtype == I32 else floats
        return source[int(leaf.value or 0)]

    return computed(hoisted, value, tuple(sizes), device)


def moved_blocks(
    order: Hoisted, captured: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor], sizes: Sequence[int],
    kv_block: int, device: torch.device,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Finds the distance of each block of keys from its place in the first order, and whether all keys of each block
    have that distance: [B or 1, H or 1, 1, blocks], int32, and a boolean scalar.
    """
    place = _computed(order, captured, ints, floats, sizes, device)
    moved = place - torch.arange(sizes[3], device=device)
    of_block = moved[..., ::kv_block]
    together = (moved == of_block.repeat_interleave(kv_block, -1)[..., : sizes[3]]).all()
    return of_block.to(torch.int32), together & ((place >= 0) & (place < sizes[3])).all()


def _run_of_columns(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The run of visible keys, the same for all rows, from the number of visible keys before each position."""
    total = counts[..., -1:]
    start = (counts == 0).sum(-1, keepdim=True, dtype=torch.int32) - 1
    end = (counts < total).sum(-1, keepdim=True, dtype=torch.int32)
    return start, end, ((end - start == total) | (total == 0)).all()


def _run_of_equals(row: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The run of the keys whose value is the row's, from [B or 1, H or 1, Sq or 1, 1] and [B or 1, H or 1, 1, Skv]."""
    batch, heads = torch.broadcast_shapes(row.shape[:2], key.shape[:2])
    row, key = row[..., 0].expand(batch, heads, -1).contiguous(), key[:, :, 0].expand(batch, heads, -1)
    ordered, place = key.contiguous().sort(stable=True, dim=-1)
    low, high = (torch.searchsorted(ordered, row, right=right) for right in (False, True))
    count, longest = high - low, key.shape[-1] - 1
    start = place.gather(-1, low.clamp(max=longest))
    end = place.gather(-1, (high - 1).clamp(min=0)) + 1
    contiguous = ((end - start == count) | (count == 0)).all()
    start, end = torch.where(count == 0, longest + 1, start), torch.where(count == 0, 0, end)
    return start.to(torch.int32), end.to(torch.int32), contiguous


def agree(blocks: Sequence[Tensor], runs: Runs, sizes: Sequence[int], block: tuple[int, int]) -> Tensor:
    """Whether the blocks of a BlockMask agree with the runs (block_mask.py)."""
    (q_block, kv_block), columns = block, sizes[3]
    rows, count = -(-sizes[2] // q_block), -(-columns // kv_block)
    padded = (0, rows * q_block - sizes[2])
    shape = torch.broadcast_shapes(runs.start.shape, runs.end.shape)
    start, end = (t.expand(shape) for t in (runs.start, runs.end))
    empty = start >= end
    low = torch.arange(0, count * kv_block, kv_block, dtype=torch.int32, device=start.device)
    latest = torch.nn.functional.pad(start, padded, value=0).unflatten(-1, (rows, q_block)).amax(-1, keepdim=True)
    earliest = torch.nn.functional.pad(end, padded, value=columns).unflatten(-1, (rows, q_block)).amin(-1, keepdim=True)
    every = (latest <= low) & (earliest >= (low + kv_block).clamp(max=columns))
    # The blocks in which the runs of rows begin and end: each block between both has a visible pair.
    first = torch.where(empty, count, start // kv_block)
    after = torch.where(empty, count, (end - 1) // kv_block + 1)
    place = torch.arange(sizes[2], device=start.device) // q_block * (count + 1)
    changes = torch.zeros((*shape[:2], rows * (count + 1)), dtype=torch.int32, device=start.device)
    one = torch.ones((), dtype=torch.int32, device=start.device).expand(shape)
    changes = changes.scatter_add(-1, first + place, one).scatter_add(-1, after + place, -one)
    some = changes.unflatten(-1, (rows, count + 1)).cumsum(-1)[..., :count] > 0
    return covered(blocks, [(0, some, every)], sizes, block)
