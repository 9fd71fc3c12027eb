"""Makes the table of endpoints of a call's rows (scoremod/masks/intervals.py), in three ways.

list_making.py chooses the way. `by_runs` is for rows of one run of keys each, which the mask's form gives, and for
blocks that agree with it; the result says whether both hold. `by_few` looks at all pairs once, for rows of NARROW
endpoints at most. `by_many` takes any number of endpoints, and is slower.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cudnn_flex_compile.kernels import block_mask
from cudnn_flex_compile.kernels.hot_function import HotFunction
from cudnn_flex_compile.kernels.row_runs import Parts, Runs, agree, moved_blocks, runs_of
from cudnn_flex_compile.kernels.visible_pairs import Pairs
from cudnn_flex_compile.scoremod.interpret import CHUNK
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.masks.intervals import (
    NARROW,
    as_table,
    every_endpoint,
    few_endpoints,
    most_endpoints,
    of_one_run,
    of_runs_in_blocks,
)

CHUNKS = 8  # chunks of rows, for each of which a compiled function has kernels of its own


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
        function: gives the table of `heads` and the numbers in one tensor; None if the tensors are these themselves.
    """

    function: HotFunction | None = None
    heads: int = 1

    def __call__(self, *tensors: Tensor) -> Found:
        return Found(*tensors) if self.function is None else _unpacked(self.function(*tensors), self.heads)

    def compiled(self, *tensors: Tensor) -> Callable[..., Found]:
        """The function, compiled for tensors such as these."""
        if self.function is None:
            return Found
        function = self.function.compiled(*tensors)
        return lambda *given: _unpacked(function(*given), self.heads)


def recipe_by_runs(pairs: Pairs, heads: int) -> Recipe | None:
    """The recipe by which `by_runs` makes the table of `pairs.tensors`; None where the mask reads scalars."""
    return _recipe("runs", pairs, heads)


def by_runs(pairs: Pairs, heads: int) -> Found:
    """The table by the runs of rows, which the mask must have."""
    return _made("runs", pairs, heads)


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


def by_few(pairs: Pairs, heads: int) -> Found:
    """The table by one look at all pairs."""
    batch, mask_heads = pairs.axes
    if batch * mask_heads * pairs.sizes[2] * pairs.sizes[3] > CHUNKS * CHUNK:
        return _unpacked(_few(pairs, heads), heads)
    return _made("few", pairs, heads)


def by_many(pairs: Pairs, heads: int, width: int) -> Found:
    """The table with `width` endpoints of each row, or fewer."""
    counts: list[Tensor] = []

    def counted() -> Iterator[tuple[int, Tensor]]:
        for start, visible in pairs.visible():
            counts.append(most_endpoints(visible))
            yield start, visible

    table = every_endpoint(counted(), pairs.sizes, heads, width)
    return Found(table, _numbers(torch.stack(counts).amax(), None, pairs))


def count(pairs: Pairs) -> int:
    """The most endpoints that a row has. Waits for the device."""
    return int(torch.stack([most_endpoints(visible) for _, visible in pairs.visible()]).amax())


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


def _runs(pairs: Pairs, heads: int) -> Tensor:
    mask = pairs.mask
    found = _runs_of(mask.parts, pairs)
    right = found.right
    if pairs.blocks:
        own = found if mask.own_parts is mask.parts else _runs_of(mask.own_parts, pairs)
        right = right & own.right & agree(pairs.blocks, own, pairs.sizes, pairs.block)
    table = of_one_run(found.start, found.end, pairs.sizes, heads)
    most = torch.full((), NARROW, dtype=torch.int32, device=pairs.device)
    return torch.cat((table.flatten(), _numbers(most, right, pairs)))


def _few(pairs: Pairs, heads: int) -> Tensor:
    rows, most = few_endpoints(pairs.with_previous(), pairs.sizes[3])
    return torch.cat((as_table(rows, pairs.sizes, heads).flatten(), _numbers(most, None, pairs)))


WAYS = {"runs": _runs, "few": _few}


def _recipe(way: str, pairs: Pairs, heads: int) -> Recipe | None:
    if pairs.mask.reads_ints or pairs.mask.reads_floats or not pairs.tensors:
        return None
    made = _function(way, pairs.program, len(pairs.blocks), tuple(pairs.sizes), tuple(pairs.block_sizes), heads)
    return Recipe(made, heads)


def _made(way: str, pairs: Pairs, heads: int) -> Found:
    """Makes the table; on a GPU a function without scalars is compiled."""
    recipe = _recipe(way, pairs, heads)
    return _unpacked(WAYS[way](pairs, heads), heads) if recipe is None else recipe(*pairs.tensors)


@functools.lru_cache(64)
def _function(
    way: str, program: str, blocks: int, sizes: tuple[int, ...], block_sizes: tuple[int, ...], heads: int
) -> HotFunction:
    def function(*tensors: Tensor) -> Tensor:
        device: Any = tensors[0].device
        rest = ((), (), (), sizes, tensors[:blocks], block_sizes, device)
        return WAYS[way](Pairs(program, tensors[blocks:], *rest), heads)

    return HotFunction(function)


def _unpacked(packed: Tensor, heads: int) -> Found:
    return Found(packed[:-3].view(heads, NARROW, -1), packed[-3:])
