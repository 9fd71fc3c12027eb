"""Records the making of a list of tiles (tiler.py) in a CUDA graph, so that a list costs the host one launch.

kernels/list_making.py uses it for masks that change at each step. A recording reads and writes memory of its own; the
list is copied out of it, so that it lives as long as it is read, also after the next one is made. A recording belongs
to one stream, on which its uses follow each other.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from cudnn_flex_compile.engine.tiles.layout import dense
from cudnn_flex_compile.engine.tiles.tile_list import Geometry, Room, TileList
from cudnn_flex_compile.engine.tiles.tiler import Tiler, tiler_of
from cudnn_flex_compile.locks import new_lock

log = logging.getLogger("cudnn_flex_compile")
LARGEST = 2**25  # numbers of 4 bytes: with a longer list, the device takes longer than the host
Layout = tuple[torch.Size, torch.dtype]
TableMaker = Callable[..., tuple[Tensor, Tensor]]  # the table of endpoints of some tensors, and numbers about it


class Recipe(Protocol):
    """The way in which tables of endpoints are made; equal ones make the same."""

    def compiled(self, *tensors: Tensor) -> TableMaker:
        """The function that makes the table, for such tensors. It can be recorded after a first call."""
        ...

    def __hash__(self) -> int: ...


class Recording:
    """Makes lists in so much room."""

    @torch.inference_mode(False)  # an inference tensor could not be written to outside
    def __init__(
        self, tiler: Tiler, room: Room, recipe: Recipe, layouts: Sequence[Layout], device: torch.device
    ) -> None:  # fmt: skip
        """Records on the current stream, which must not be capturing. Raises CUDA's error where it does not record.

        Args:
            layouts: those of the tensors of which a table is made.
        """
        self._given = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in layouts]
        make = self._make = recipe.compiled(*self._given)
        self._tiler, self._lock = tiler, new_lock()  # the graph launches its kernels
        draft = tiler.draft(make(*self._given)[0], room)
        tiler.fill(draft)  # compiles and loads kernels, which cannot be recorded
        self._graph, self._listed = torch.cuda.CUDAGraph(), draft.listed
        stream, beside = torch.cuda.Stream(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                table, numbers = make(*self._given)
                self._draft = replace(draft, table=dense(table))
                tiler.fill(self._draft, beside)
                self._numbers = torch.cat((numbers, tiler.needed(self._draft)))
            finally:
                self._graph.capture_end()

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[TileList, Tensor]:
        """The list, if there is room for it, and the numbers about its table, before those of its tiles (Tiler.needed).

        It is made on the stream of the recording, which must be the current one.
        """
        with self._lock, torch.no_grad():
            for mine, tensor in zip(self._given, tensors, strict=True):
                mine.copy_(tensor)
            self._graph.replay()
            return TileList(self._listed.numbers.clone(), self._listed.layout), self._numbers.clone()


@functools.lru_cache(8)
def recording_of(
    geometry: Geometry, room: Room, recipe: Recipe, layouts: tuple[Layout, ...], device: int, stream: int
) -> Recording | None:
    """The recording for a device and a stream, which must be the current ones; None for lists that are too large to be
    kept twice, and where CUDA records none.
    """
    tiler = tiler_of(geometry, device)
    if tiler.size(room) > LARGEST:
        return None
    try:
        return Recording(tiler, room, recipe, layouts, torch.device("cuda", device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        log.warning("cudnn_flex: lists of tiles are not recorded, which is slower: %s", str(error).splitlines()[0])
        return None
