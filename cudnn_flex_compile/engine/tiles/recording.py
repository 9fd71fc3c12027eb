"""Records the making of a list of tiles (tiler.py) in a CUDA graph, so that a list costs the host one launch.

kernels/list_making.py uses it for masks that change at each step. A recording reads and writes memory of its own; the
list is copied out of it, so that it lives as long as it is read, also after the next one is made. A recording belongs
to one stream, on which its uses follow each other.
"""

import functools
import logging

import torch
from torch import Tensor

from cudnn_flex_compile.engine.tiles.tile_list import Geometry, Room, TileList
from cudnn_flex_compile.engine.tiles.tiler import Tiler, tiler_of
from cudnn_flex_compile.locks import new_lock

log = logging.getLogger("cudnn_flex_compile")
LARGEST = 2**25  # numbers of 4 bytes: with a longer list, the device takes longer than the host


class Recording:
    """Makes lists in so much room, of tables of so many endpoints a row."""

    @torch.inference_mode(False)  # an inference tensor could not be written to outside
    def __init__(self, tiler: Tiler, room: Room, width: int, device: torch.device) -> None:
        """Records on the current stream, which must not be capturing. Raises CUDA's error where it does not record."""
        g = tiler.geometry
        table = torch.full((g.mask_heads, width, g.batch * g.rows), g.columns, dtype=torch.int32, device=device)
        self._tiler = tiler  # the graph launches its kernels
        self._lock, self._draft = new_lock(), tiler.draft(table, room)
        tiler.fill(self._draft)  # compiles and loads kernels, which cannot be recorded
        self._graph = torch.cuda.CUDAGraph()
        stream, beside = torch.cuda.Stream(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                tiler.fill(self._draft, beside)
                self._needed = tiler.needed(self._draft)
            finally:
                self._graph.capture_end()

    def within(self, table: Tensor) -> tuple[TileList, Tensor]:
        """Does what Tiler.within does, on the stream of the recording, which is the current one."""
        with self._lock:
            self._draft.table.copy_(table)
            self._graph.replay()
            listed = self._draft.listed
            return TileList(listed.numbers.clone(), listed.layout), self._needed.clone()


@functools.lru_cache(8)
def recording_of(geometry: Geometry, room: Room, width: int, device: int, stream: int) -> Recording | None:
    """The recording for a device and a stream, which must be the current ones; None for lists that are too large to be
    kept twice, and where CUDA records none.
    """
    tiler = tiler_of(geometry, device)
    if tiler.size(room) > LARGEST:
        return None
    try:
        return Recording(tiler, room, width, torch.device("cuda", device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        log.warning("cudnn_flex: lists of tiles are not recorded, which is slower: %s", str(error).splitlines()[0])
        return None
