"""Makes the list of a mask's tiles, once a step for all calls that share the mask.

Knows nothing of attention. The endpoints of rows come from the surrounding graph, which finds a few for each row and
counts how many there are. The host reads that count, and whether the BlockMask agrees, in one look, for which it waits
when the list is enqueued, so that the device does not wait for the host. The list is the guard of its calls
(contract.py): they run by it if the BlockMask agrees. Where a row has more endpoints, all of them
are found here: slower, and right for any mask. Under CUDA graph capture the host can look at nothing, and so there is
room for every endpoint that a row can have.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.engine.tiles.recording import recording_of
from cudnn_flex_compile.engine.tiles.tile_list import Geometry, Tiler, tiler_of
from cudnn_flex_compile.kernels.async_read import AsyncRead
from cudnn_flex_compile.kernels.block_mask import agree_with_endpoints
from cudnn_flex_compile.kernels.block_mask_contract import AGREED, Answer, with_answer
from cudnn_flex_compile.scoremod.interpret import visible_rows
from cudnn_flex_compile.scoremod.masks.intervals import every_endpoint
from cudnn_flex_compile.scoremod.text import parse

log = logging.getLogger("cudnn_flex_compile")
_replayed: set[Tiler] = set()  # whose kernels a CUDA graph holds, which are to stay as long as the process


def make(
    table: Tensor, found: Tensor, blocks: Sequence[Tensor], block_sizes: Sequence[int],
    operands: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor], program: str, geometry: Geometry,
) -> Tensor:  # fmt: skip
    """The list, on the current device, which must be that of the table.

    Args:
        table: endpoints of rows (scoremod/masks/intervals.py).
        found: how many a row has at most, and, under a BlockMask, whether that agrees with the table; int32, [1 or 2].
        blocks, block_sizes: of the BlockMask, as in kernels.stock.Stock.
        operands, ints, floats, program: of the mask.
    """
    tiler = tiler_of(geometry, table.device.index)

    def all_endpoints(most: int) -> Tensor:
        return _all_endpoints(most, operands, ints, floats, program, geometry, table.device)

    if torch.cuda.is_current_stream_capturing():
        log.warning("cudnn_flex: a mask's tiles are listed under CUDA graph capture, for any mask, which is slow")
        return _captured(tiler, all_endpoints(geometry.columns), blocks, block_sizes)
    numbers = AsyncRead(found)
    recording = recording_of(geometry, table.device.index, torch.cuda.current_stream().cuda_stream)
    tiles = (recording or tiler).list(table)
    count, *right = numbers()
    if count > table.shape[1]:
        table = all_endpoints(count)
        tiles = tiler.list(table)
        right = [bool(agree_with_endpoints(blocks, table, geometry.sizes, block_sizes))] if blocks else []
    return with_answer(tiles, _answer(right))


def none(
    table: Tensor, found: Tensor, blocks: Sequence[Tensor], block_sizes: Sequence[int],
    operands: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor], program: str, geometry: Geometry,
) -> Tensor:  # fmt: skip
    """An empty list, where no kernel reads one."""
    count, *right = found.tolist()
    if blocks and count > table.shape[1]:
        table = _all_endpoints(count, operands, ints, floats, program, geometry, table.device)
        right = [bool(agree_with_endpoints(blocks, table, geometry.sizes, block_sizes))]
    return with_answer(table.new_empty(0), _answer(right))


def _answer(right: Sequence[bool]) -> Answer:
    return Answer(lambda: all(right))


def _all_endpoints(
    most: int, operands: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor], program: str,
    geometry: Geometry, device: torch.device,
) -> Tensor:  # fmt: skip
    rows = visible_rows(parse(program).mask, operands, ints, floats, geometry.sizes, 1, device)
    return every_endpoint(rows, geometry.sizes, geometry.mask_heads, most)


def _captured(tiler: Tiler, table: Tensor, blocks: Sequence[Tensor], block_sizes: Sequence[int]) -> Tensor:
    _replayed.add(tiler)
    if blocks:
        torch_private.assert_on_device(agree_with_endpoints(blocks, table, tiler.geometry.sizes, block_sizes))
    return with_answer(tiler.list(table), AGREED)
