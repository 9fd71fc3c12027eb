"""Makes the table of endpoints of a call's rows (scoremod/masks/intervals.py), in several ways.

list_making.py chooses the way. Each takes longer than the one before, and its result says whether it is right:

    RUNS          rows of one run of keys each, which the mask's form gives, and blocks that agree with it
    BLOCKS        rows of one run in each block of keys
    FIRST_BLOCKS  a look at all pairs once, where the blocks of all heads are those of the first (visible_pairs.py)
    PAIRS         a look at all pairs once
    EVERY         the same op by op, for any number of endpoints
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cudnn_flex_compile.kernels import block_mask
from cudnn_flex_compile.kernels.hot_function import HotFunction
from cudnn_flex_compile.kernels.row_runs import Parts, Runs, agree, moved_blocks, runs_of
from cudnn_flex_compile.kernels.visible_pairs import Mask, Pairs
from cudnn_flex_compile.scoremod.interpret import CHUNK
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.masks.intervals import (
    NARROW,
    as_table,
    endpoints_in_segments,
    every_endpoint,
    few_endpoints,
    most_endpoints,
    of_one_run,
    of_runs_in_blocks,
)

RUNS, BLOCKS, FIRST_BLOCKS, PAIRS, EVERY = range(5)
WHOLE = 2**30  # pairs that one kernel of a compiled function looks at: their indices have 32 bits
CHUNKS = 16  # the most chunks of WHOLE pairs, for each of which a compiled function has kernels of its own


class Found(NamedTuple):
    """A table, and numbers by which the host knows whether it may be used.

    Attributes:
        table: [1 or H, n, B * Sq], int32.
        numbers: int32 [3]: the most endpoints that a row has; whether the table is right if these are n at most;
            whether the BlockMask is well-formed (block_mask.py).
    """

    table: Tensor
    numbers: Tensor


@dataclass(frozen=True, slots=True)
class Recipe:
    """The way in which tables are made of tensors, such as those that a mask reads.

    Attributes:
        function: gives the table, of `heads` and of `width` endpoints, and the numbers in one tensor; None if the
            tensors are these themselves.
    """

    function: HotFunction | None = None
    heads: int = 1
    width: int = NARROW

    def __call__(self, *tensors: Tensor) -> Found:
        return Found(*tensors) if self.function is None else _unpacked(self.function(*tensors), self.heads, self.width)

    def compiled(self, *tensors: Tensor) -> Callable[..., Found]:
        """The function, compiled for tensors such as these."""
        if self.function is None:
            return Found
        function = self.function.compiled(*tensors)
        return lambda *given: _unpacked(function(*given), self.heads, self.width)


def ways(pairs: Pairs) -> list[int]:
    """The ways in which the table may be made."""
    has = {
        RUNS: pairs.mask.parts is not None, BLOCKS: has_runs_in_blocks(pairs),
        FIRST_BLOCKS: pairs.by_first_blocks() is not None, PAIRS: True, EVERY: True,
    }  # fmt: skip
    return [way for way, there in has.items() if there]


def looks_at_pairs(mask: Mask, blocks: bool) -> bool:
    """Whether tables of a mask, under a BlockMask or without one, take a look at all pairs."""
    return mask.parts is None and not (blocks and mask.in_blocks is not None)


def recipe(way: int, pairs: Pairs, heads: int, width: int) -> Recipe | None:
    """The recipe by which `made` makes the table of `pairs.tensors`; None where it has none, and where the mask reads
    floats.
    """
    if way not in COMPILED or pairs.mask.reads_floats or not pairs.tensors:
        return None
    if way != RUNS and looked_at(way, pairs).count > CHUNKS * WHOLE:
        return None
    numbers = tuple(pairs.sizes), tuple(pairs.block_sizes), tuple(pairs.ints) if pairs.mask.reads_ints else ()
    width = NARROW if way == RUNS else width
    return Recipe(_function(way, pairs.program, len(pairs.blocks), *numbers, heads, width), heads, width)


def made(way: int, pairs: Pairs, heads: int, width: int) -> Found:
    """The table with `width` endpoints of each row, an odd number, or fewer. On a GPU, a recipe's function is compiled
    where it runs again.
    """
    found = recipe(way, pairs, heads, width)
    if found is not None:
        return found(*pairs.tensors)
    if way in COMPILED:
        return _unpacked(COMPILED[way](pairs, heads, width, CHUNK), heads, NARROW if way == RUNS else width)
    return by_blocks(pairs, heads, width) if way == BLOCKS else by_many(pairs, heads, width)


def looked_at(way: int, pairs: Pairs) -> Pairs:
    """The pairs that are looked at."""
    return (pairs.by_first_blocks() if way == FIRST_BLOCKS else None) or pairs


def width_for(most: int) -> int:
    """A width that has room for so many endpoints, one of few: for each, a function is compiled."""
    return max(NARROW, (1 << most.bit_length()) - 1)


def has_runs_in_blocks(pairs: Pairs) -> bool:
    """Whether a BlockMask selects blocks of rows that otherwise see one run of keys."""
    return bool(pairs.blocks) and pairs.mask.in_blocks is not None


def by_blocks(pairs: Pairs, heads: int, width: int) -> Found:
    """With `width` endpoints of each row, or fewer, by the run that it sees in each block of keys."""
    q_block, kv_block = pairs.block
    assert pairs.mask.in_blocks is not None
    limits, right = _limits_in_blocks(pairs.mask.in_blocks, pairs)
    kinds = block_mask.by_kind(pairs.blocks, pairs.sizes, pairs.block)
    columns, count = pairs.sizes[3], kinds[0].shape[3]
    edges = (torch.arange(count + 1, dtype=torch.int32, device=pairs.device) * kv_block).clamp(max=columns)
    step = max(1, CHUNK // (2 * heads * pairs.sizes[0] * count))
    tables: list[Tensor] = []
    counts: list[Tensor] = []
    for first in range(0, pairs.sizes[2], step):
        rows = slice(first, min(first + step, pairs.sizes[2]))
        block = torch.arange(rows.start, rows.stop, device=pairs.device) // q_block
        partial, full = (kind[:, :, block] for kind in kinds)
        near = ((_of_rows(limit, rows) - moved).clamp(edges[:-1], edges[1:]) for limit, moved in limits)
        start, end, low, high = near
        start = torch.where(full, edges[:-1], torch.where(partial, start, edges[1:]))
        end = torch.where(full, edges[1:], torch.where(partial, end, edges[:-1]))
        shown = torch.broadcast_tensors(start.maximum(low), end.minimum(high))
        table, most = of_runs_in_blocks(shown[0], shown[1], edges, width)
        tables.append(table)
        counts.append(most)
    return Found(as_table(torch.cat(tables, 2), pairs.sizes, heads), _numbers(torch.stack(counts).amax(), right, pairs))


def _limits_in_blocks(in_blocks: Sequence[Parts], pairs: Pairs) -> tuple[list[tuple[Tensor, Any]], Tensor]:
    """The start and the end of the runs of each parts' rows, each beside how far a block of keys is from the place that
    they are about; and whether they are right.
    """
    limits: list[tuple[Tensor, Any]] = []
    right = torch.ones((), dtype=torch.bool, device=pairs.device)
    for parts in in_blocks:
        runs, moved = _runs_of(parts, pairs), 0
        if parts.order is not None:
            given = pairs.captured, pairs.ints, pairs.floats, pairs.sizes
            moved, together = moved_blocks(parts.order, *given, pairs.block[1], pairs.device)
            right = right & together
        limits += [(runs.start, moved), (runs.end, moved)]
        right = right & runs.right
    return limits, right


def _of_rows(limit: Tensor, rows: slice) -> Tensor:
    return (limit[:, :, rows] if limit.shape[2] > 1 else limit).unsqueeze(-1)


def by_many(pairs: Pairs, heads: int, width: int) -> Found:
    """The table with `width` endpoints of each row, or fewer."""
    counts: list[Tensor] = []

    def counted() -> Iterator[tuple[int, Tensor]]:
        for start, visible in pairs.visible():
            counts.append(most_endpoints(visible))
            yield start, visible

    table = every_endpoint(counted(), pairs.sizes, heads, width)
    return Found(table, _numbers(torch.stack(counts).amax(), None, pairs))


def well_formed(pairs: Pairs) -> Tensor:
    """Whether the BlockMask is well-formed (block_mask.py), if there is one."""
    if not pairs.blocks:
        return torch.ones((), dtype=torch.bool, device=pairs.device)
    return block_mask.well_formed(pairs.blocks, pairs.sizes, pairs.block)


def known_beforehand(pairs: Pairs) -> bool:
    """Whether the runs of rows, in blocks under a BlockMask, are right for any data."""
    mask = pairs.mask
    parts = (mask.in_blocks or (None,)) if pairs.blocks else (mask.parts,)
    return all(p is not None and p.order is None and not p.equal and not split(p.program.mask).biases for p in parts)


def _numbers(most: Tensor, right: Tensor | None, pairs: Pairs) -> Tensor:
    right = torch.ones((), dtype=torch.bool, device=pairs.device) if right is None else right
    return torch.stack([t.to(torch.int32) for t in (most, right, well_formed(pairs))])


def _runs_of(parts: Parts | None, pairs: Pairs) -> Runs:
    assert parts is not None
    return runs_of(parts, pairs.captured, pairs.ints, pairs.floats, pairs.sizes, pairs.device)


def _runs(pairs: Pairs, heads: int, *_: int) -> Tensor:
    mask = pairs.mask
    found = _runs_of(mask.parts, pairs)
    right = found.right
    if pairs.blocks:
        own = found if mask.own_parts is mask.parts else _runs_of(mask.own_parts, pairs)
        right = right & own.right & agree(pairs.blocks, own, pairs.sizes, pairs.block)
    table = of_one_run(found.start, found.end, pairs.sizes, heads)
    most = torch.full((), NARROW, dtype=torch.int32, device=pairs.device)
    return torch.cat((table.flatten(), _numbers(most, right, pairs)))


def _pairs(pairs: Pairs, heads: int, width: int, chunk: int) -> Tensor:
    return _of_pairs(pairs, None, pairs, heads, width, chunk)


def _first_blocks(pairs: Pairs, heads: int, width: int, chunk: int) -> Tensor:
    return _of_pairs(looked_at(FIRST_BLOCKS, pairs), pairs.blocks_repeat(), pairs, heads, width, chunk)


def _of_pairs(looked_at: Pairs, right: Tensor | None, pairs: Pairs, heads: int, width: int, chunk: int) -> Tensor:
    here, columns = looked_at.with_previous(chunk), pairs.sizes[3]
    if width == NARROW:
        rows, most = few_endpoints(here, columns)
    else:
        rows, most, found = endpoints_in_segments(here, columns, width)
        right = found if right is None else right & found
    return torch.cat((as_table(rows, pairs.sizes, heads).flatten(), _numbers(most, right, pairs)))


COMPILED: dict[int, Callable[..., Tensor]] = {RUNS: _runs, FIRST_BLOCKS: _first_blocks, PAIRS: _pairs}


@functools.lru_cache(64)
def _function(
    way: int, program: str, blocks: int, sizes: tuple[int, ...], block_sizes: tuple[int, ...], ints: tuple[int, ...],
    heads: int, width: int,
) -> HotFunction:  # fmt: skip
    def of(tensors: Sequence[Tensor]) -> Pairs:
        device: Any = tensors[0].device
        return Pairs(program, tensors[blocks:], (), ints, (), sizes, tensors[:blocks], block_sizes, device)

    def function(*tensors: Tensor) -> Tensor:
        return COMPILED[way](of(tensors), heads, width, CHUNK)

    def traced(*tensors: Tensor) -> Tensor:
        return COMPILED[way](of(tensors), heads, width, WHOLE)

    long = way != RUNS and not ints and math.prod(sizes[2:]) > WHOLE  # integers may change in each step
    return HotFunction(function, traced, long=long)


def _unpacked(packed: Tensor, heads: int, width: int) -> Found:
    return Found(packed[:-3].view(heads, width, -1), packed[-3:])
