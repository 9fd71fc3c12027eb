"""Keeps the list of a mask's tiles for all calls, layers and graphs that share the mask.

engine/tiles says what a list is, and list_making.py makes one. A list is identified by the tensors that it was made
from, in their versions; the list of a mask that reads no tensor, by its geometry. The op returns a handle, an empty
tensor that leads to the list: compiled graphs must not own the list's memory, whose size depends on the data.
"""

import functools
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.tiles.recording import recording_of
from cudnn_flex_compile.engine.tiles.tile_list import Geometry, TileList
from cudnn_flex_compile.kernels.arguments import HANDLE
from cudnn_flex_compile.kernels.list_making import Listed, Needs, begin, held, under_capture
from cudnn_flex_compile.kernels.remembered import Remembered
from cudnn_flex_compile.kernels.stock import Given, Stock
from cudnn_flex_compile.kernels.visible_pairs import Pairs, mask_of
from cudnn_flex_compile.reasons import Reason

KEPT = 64  # the number of lists, and of masks whose needs are remembered
_known = Remembered[Tensor](KEPT)


@functools.lru_cache(KEPT)
def _needs_of(*mask: Hashable) -> Needs:
    return Needs()


engine.also_clear.extend((_known.clear, _needs_of.cache_clear, recording_of.cache_clear))


def handle_of(
    blocks: Sequence[Tensor], captured: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor], program: str,
    block_sizes: Sequence[int], geometry: Sequence[int], dtype: torch.dtype, device: torch.device, budget: int,
) -> Tensor:  # fmt: skip
    """The handle of a list, on the current device, which must be `device`.

    Args:
        blocks, block_sizes: the BlockMask's, as in stock.Stock.
        captured, ints, floats, program: the mask's (visible_pairs.text_of).
        geometry: as Geometry.of takes it.
        budget: MiB that a list may take.
    """
    tensors, mask, cuda = (*blocks, *captured), mask_of(program), device.type == "cuda"
    numbers = (*(ints if mask.reads_ints else ()), *(map(float, floats) if mask.reads_floats else ()))
    stream = torch_private.current_stream(device.index) if cuda else 0
    kind = program, len(blocks), tuple(block_sizes), tuple(geometry), dtype, device
    question = kind, numbers, budget, stream if tensors else 0
    found = _known.get(question, tensors)
    capturing = cuda and torch.cuda.is_current_stream_capturing()
    if found is not None and not (capturing and tensors):  # a replay follows tensors that are changed in place
        if cuda and not tensors:
            _also_on(stream, found, capturing)
        return found
    pairs = Pairs(program, captured, (), ints, floats, tuple(geometry[:4]), blocks, block_sizes, device)
    listed = Listed(Geometry.of(geometry, dtype), _needs_of(*kind), budget, stream=stream)
    handle, noted = _handle(listed, device), _known.noted(question, tensors)
    if capturing:
        listed.found = under_capture(pairs, listed.geometry)
        return handle
    if cuda:
        begin(listed, pairs)
        if listed.found is None:
            reference = weakref.ref(handle)
            listed.keep = lambda: _known.keep(noted, reference())
            return handle
        if not tensors:  # the list stays right, on all streams
            torch.cuda.current_stream().synchronize()
    if not listed.passing:
        _known.keep(noted, handle)
    return handle


def _also_on(stream: int, handle: Tensor, capturing: bool) -> None:
    """Keeps the memory of a list that is read on a stream on which it was not made, or by each replay."""
    listed: Any = getattr(handle, HANDLE)
    if capturing:
        held.append(handle)
    elif listed.stream != stream and isinstance(listed.found, TileList):
        listed.found.numbers.record_stream(torch.cuda.current_stream())


def settled(
    handle: Tensor, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor], ints: Sequence[int],
    floats: Sequence[Tensor], program: str, given: Given | None,
) -> Listed:  # fmt: skip
    """The `Listed` of a handle, with the list or a reason in it, for a call that is about to be launched.

    Args:
        operands, ints, floats, program, given: as the attention ops take them.
    """
    listed: Listed | None = getattr(handle, HANDLE, None)
    if listed is not None and listed.found is not None:
        return listed

    def pairs() -> Pairs:
        sizes = (*query.shape[:3], key.shape[2])
        if given is None:
            return Pairs(program, (), operands, ints, floats, sizes, (), (), query.device)
        stock = Stock.of(*given)
        rest = (ints, floats, sizes, stock.blocks, stock.block_sizes, query.device)
        return Pairs(stock.program, stock.captured, operands, *rest)

    if listed is None:  # the handle was copied, as by hooks of saved tensors
        listed = Listed(_geometry_of(query, key, value, pairs()), Needs(), None)
    listed.settle(pairs)
    return listed


def _geometry_of(query: Tensor, key: Tensor, value: Tensor, pairs: Pairs) -> Geometry:
    batch, heads, rows, dim = query.shape
    mask_heads = heads if pairs.axes[1] > 1 else 1
    sizes = (batch, heads, rows, key.shape[2], key.shape[1], dim, value.shape[3], mask_heads, True)
    return Geometry.of(sizes, query.dtype)


def found_now(handle: Tensor, pairs: Pairs) -> TileList | Reason | None:
    """The list of a handle, or the reason why there is none. Waits for the device."""
    listed: Listed = getattr(handle, HANDLE)
    if listed.found is None:
        listed.settle(lambda: pairs)
    return listed.found


def _handle(listed: Listed, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be saved for a backward
        handle = torch.empty(0, dtype=torch.int32, device=device)
    setattr(handle, HANDLE, listed)
    return handle
