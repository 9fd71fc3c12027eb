"""Makes the list of a mask's tiles, in the way and in the room that the last list of the mask needed.

A step makes its list in the room that the last one needed, with a reserve. The host reads whether the room was enough
when the first call is launched; where it was not, the list is made again. Under CUDA graph capture the host cannot
read, and there is room for any mask. tile_lists.py keeps what is made here.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.engine.tiles.recording import recording_of
from cudnn_flex_compile.engine.tiles.tile_list import ITEMSIZE, Geometry, Room, TileList
from cudnn_flex_compile.engine.tiles.tiler import Tiler, tiler_of
from cudnn_flex_compile.kernels import row_tables
from cudnn_flex_compile.kernels.async_read import AsyncRead
from cudnn_flex_compile.kernels.visible_pairs import Pairs
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod.masks.intervals import NARROW

log = logging.getLogger("cudnn_flex_compile")
MIB = 2**20
RECORDED = 2  # lists that are made alike before the making is recorded
RETRY = 16  # lists that are made in a slower way before the fastest is tried again
ILL_FORMED = Reason(Code.BLOCK_MASK, "lists a block twice, or has other blocks for queries than for keys and values")
held: list[Any] = []  # objects that CUDA graphs read, kept as long as the process


@dataclass(slots=True)
class Needs:
    """The needs of the last lists of a mask.

    Attributes:
        room: the memory, with some reserve; None before the first list.
        width: the endpoints of a row.
        alike: the number of lists that were made with this room, and with these integers.
        ints: the integers that the mask of the last list read.
        way: the way in which the table of rows was made (row_tables.py).
        since: counts the lists since the fastest way was last tried.
    """

    room: Room | None = None
    width: int = NARROW
    alike: int = 0
    ints: tuple[int, ...] = ()
    way: int = row_tables.RUNS
    since: int = 0


@dataclass(eq=False, slots=True)
class Listed:
    """The list, or the reason why there is none, that a handle leads to.

    Attributes:
        needs, budget: the needs and the budget of a list that is made again.
        found: the list, or why there is none; None before the host has looked, and on the CPU.
        look: makes the host look. It returns None where the list must be made again.
        keep: a function that is called with the list.
        stream: the stream on which it was made.
    """

    geometry: Geometry
    needs: Needs
    budget: int | None
    found: TileList | Reason | None = None
    look: Callable[[], TileList | Reason | None] = lambda: None
    keep: Callable[[], None] = lambda: None
    stream: int = 0

    @property
    def mask_heads(self) -> int:
        """1 if all heads share the list, else as many as there are."""
        return self.geometry.mask_heads

    @property
    def passing(self) -> bool:
        """Whether there is no list for a reason that may pass, such as a lack of memory: the next call tries again."""
        return isinstance(self.found, Reason) and not self.found.lasting

    @property
    def tiles(self) -> TileList | None:
        """The list."""
        return self.found if isinstance(self.found, TileList) else None

    def settle(self, pairs: Callable[[], Pairs]) -> None:
        """Makes the host look whether the list is right.

        Args:
            pairs: the pairs of the call that is about to be launched, whose tensors are as the op had them.
        """
        self.found = _or_why_not(lambda: self.look() or _anew(pairs(), self))
        if not self.passing:
            self.keep()
        self.look, self.keep = lambda: None, lambda: None


class Most(NamedTuple):
    """The most endpoints that a row has, and whether finding them takes long."""

    endpoints: int
    slowly: bool


def most_endpoints(pairs: Pairs) -> Most | Reason:
    """The most endpoints that a row has, or the reason why there can be no list. Waits for the device."""
    found = _first_right(pairs, pairs.axes[1], row_tables.RUNS)
    return found if isinstance(found, Reason) else Most(found.most, found.way == row_tables.EVERY)


class Right(NamedTuple):
    """A right way for the pairs, the most endpoints that a row has, and the table with NARROW endpoints of each."""

    way: int
    most: int
    table: Tensor


def _first_right(pairs: Pairs, heads: int, first: int) -> Right | Reason:
    """The fastest way, from `first` on, that is right. Waits for the device."""
    for way in row_tables.ways(pairs):
        if way >= first:
            table, numbers = row_tables.made(way, pairs, heads, NARROW)
            most, right, well = numbers.tolist()
            if not well:
                return ILL_FORMED
            if right:
                return Right(way, most, table)
    raise AssertionError("the last way is always right")


Made = TypeVar("Made")


def _or_why_not(make: Callable[[], Made]) -> Made | Reason:
    """Returns a reason where making a list fails, so that its calls run on Inductor's kernel."""
    try:
        return make()
    except torch.OutOfMemoryError as error:
        return Reason(Code.MEMORY, f"no memory for a list of tiles: {str(error)[:120]}", lasting=False)
    except Exception as error:  # a bug of ours, or of what compiles for us, must not stop the model
        if torch.cuda.is_current_stream_capturing():
            raise
        log.warning("cudnn_flex: a list of tiles could not be made", exc_info=True)
        return Reason(Code.INTERNAL, f"a list of tiles: {type(error).__name__}: {error}")


def begin(listed: Listed, pairs: Pairs) -> None:
    """Makes a list, or enqueues its making."""
    listed.found = _or_why_not(lambda: _first_found(listed, pairs))


def _first_found(listed: Listed, pairs: Pairs) -> TileList | Reason | None:
    """Makes the list, or enqueues its making, and leaves it to the first call to look at the outcome: None."""
    geometry, needs = listed.geometry, listed.needs
    room = needs.room
    if room is None or not pairs.tensors:
        return _exact(pairs, listed)
    recipe, given = _recipe(pairs, geometry.mask_heads, needs)
    width, device, ints = needs.width, pairs.device.index, tuple(pairs.ints)
    needs.alike, needs.ints = (needs.alike if ints == needs.ints else 0) + 1, ints
    make = functools.partial(_unrecorded, recipe, tiler_of(geometry, device), room)
    if needs.alike > RECORDED:
        layouts, stream = tuple([(t.shape, t.dtype) for t in given]), torch.cuda.current_stream().cuda_stream
        make = recording_of(geometry, room, recipe, layouts, device, stream) or make
    tiles, counted = make(given)
    numbers = AsyncRead(counted)

    def look() -> TileList | Reason | None:
        most, right, well, *counted = numbers()
        if not well:
            return ILL_FORMED
        if not right or most > width:
            needs.way, needs.since = min(needs.way + (not right), row_tables.EVERY), 1
            needs.width = row_tables.width_for(most)
            return None
        wanted = Room(*counted)
        if not room.holds(wanted):
            return None
        if room.is_wide_for(wanted):
            needs.room, needs.alike = wanted.with_reserve(), 0
        return tiles

    listed.look = look
    return None


def _unrecorded(
    recipe: row_tables.Recipe, tiler: Tiler, room: Room, given: Sequence[Tensor]
) -> tuple[TileList, Tensor]:
    """Does what a Recording does."""
    table, numbers = recipe(*given)
    tiles, needed = tiler.within(table, room)
    return tiles, torch.cat((numbers, needed))


def _recipe(pairs: Pairs, heads: int, needs: Needs) -> tuple[row_tables.Recipe, Sequence[Tensor]]:
    """The recipe of a table that is made as the last one was, and the tensors that it takes."""
    if needs.since == RETRY:
        needs.way, needs.since, needs.width = row_tables.RUNS, 0, NARROW
    ways = row_tables.ways(pairs)
    needs.way = next(way for way in ways if way >= needs.way)
    needs.since += needs.way > ways[0]
    recipe = row_tables.recipe(needs.way, pairs, heads, needs.width)
    if recipe is not None:
        return recipe, pairs.tensors
    return row_tables.Recipe(), row_tables.made(needs.way, pairs, heads, needs.width)


def _exact(pairs: Pairs, listed: Listed) -> TileList | Reason:
    """The list, with the room that it needs. Waits for the device."""
    g, needs, budget = listed.geometry, listed.needs, listed.budget
    way = row_tables.RUNS
    while True:
        found = _first_right(pairs, g.mask_heads, way)
        if isinstance(found, Reason):
            return found
        way, most, table = found
        width = row_tables.width_for(most)
        mebibytes = g.mask_heads * g.batch * g.rows * width * ITEMSIZE // MIB
        if budget is not None and mebibytes > budget:
            return _too_large(mebibytes, budget)
        if most > NARROW:
            table, numbers = row_tables.made(way, pairs, g.mask_heads, width)
            if not numbers[1]:  # segments of rows may have too many endpoints
                way += 1
                continue
        needs.way, needs.width, needs.since = way, width, int(way != row_tables.ways(pairs)[0])
        return _of_table(table, listed)


def _anew(pairs: Pairs, listed: Listed) -> TileList | Reason:
    """Makes the list again, also in place of a list whose handle was lost."""
    if torch.cuda.is_current_stream_capturing():
        return under_capture(pairs, listed.geometry)
    return _exact(pairs, listed)


def _of_table(table: Tensor, listed: Listed) -> TileList | Reason:
    tiler, needs, budget = tiler_of(listed.geometry, table.device.index), listed.needs, listed.budget
    counted, room = tiler.count(table)
    mebibytes, reserve = tiler.size(room) * ITEMSIZE // MIB, room.with_reserve()
    if budget is not None and mebibytes > budget:
        return _too_large(mebibytes, budget)
    within = budget is None or tiler.size(reserve) * ITEMSIZE // MIB <= budget
    needs.room, needs.alike = reserve if within else room, 0
    return tiler.write(counted, room)


def _too_large(mebibytes: int, budget: int) -> Reason:
    return Reason(Code.LIST_BUDGET, f"a list of tiles takes {mebibytes} MiB, more than bias_budget_mb={budget}")


def under_capture(pairs: Pairs, geometry: Geometry) -> TileList:
    """The list in room for any mask."""
    log.warning("cudnn_flex: a mask's tiles are listed under CUDA graph capture, for any mask, which is slow")
    if pairs.blocks:
        torch_private.assert_on_device(row_tables.well_formed(pairs))
    tiler = tiler_of(geometry, pairs.device.index)
    held.append(tiler)  # the graph launches its kernels
    heads = geometry.mask_heads
    if row_tables.known_beforehand(pairs):
        most = 1 + 2 * -(-geometry.columns // pairs.block[1]) if pairs.blocks else NARROW
        found = row_tables.made(row_tables.BLOCKS if pairs.blocks else row_tables.RUNS, pairs, heads, most)
    else:
        found = row_tables.made(row_tables.EVERY, pairs, heads, geometry.columns)
    return tiler.within(found.table, tiler.every_tile)[0]
