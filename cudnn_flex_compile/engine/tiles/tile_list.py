"""Lists the tiles in which a mask shows any pair, as cudnn.flex_attention's kernels take them, in one tensor.

Knows nothing of programs: it takes the endpoints of rows (scoremod/masks/intervals.py). The frontend's own
`create_mask_plan` looks at what the device counted, and allocates so much, in tensors of their own. Here the list has
room for all tiles, and so it is one tensor, of a shape that a compiled graph knows, and the host looks at nothing. What
finds the tiles and writes their bits are stages of the frontend. They are private: one that is missing, or takes other
arguments, means that there is no plan (engine/tiles/plan.py), and what they list is certified with the kernels that
read it. Its stages that add counts up and order the work run on one thread; torch does that here.

The list is for one geometry. Its first part serves the forward; a second one, in training, the backward.
"""

import contextlib
import functools
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from cudnn_flex_compile.engine.tiles.layout import Layout, Views

NAME = "tile_lists"  # of the strategy that runs by a list
ARCHITECTURE = 90  # the stages and their shapes were read, and measured, for this one
L2_BYTES = 50 * 2**20  # of keys and values that are read by what runs at one time
NO_SEQUENCES = (None, None, None)  # all sequences have one length


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a list of tiles depends on beside the mask: sizes, whether for a backward, and the dtype of queries.

    Attributes:
        mask_heads: 1 if all heads share the mask, else `heads`.
    """

    batch: int
    heads: int
    kv_heads: int
    rows: int
    columns: int
    dim: int
    value_dim: int
    mask_heads: int
    training: bool
    dtype: torch.dtype

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.rows, self.columns

    @property
    def numbers(self) -> list[int]:
        """All but the dtype, as the op takes them."""
        return [
            *self.sizes, self.kv_heads, self.dim, self.value_dim, self.mask_heads, int(self.training),
        ]  # fmt: skip

    @staticmethod
    def of(numbers: Sequence[int], dtype: torch.dtype) -> "Geometry":
        batch, heads, rows, columns, kv_heads, dim, value_dim, mask_heads, training = numbers
        return Geometry(batch, heads, kv_heads, rows, columns, dim, value_dim, mask_heads, bool(training), dtype)


_known: Any = WeakTensorKeyDictionary()  # views of the lists that are alive: all layers read them
# The order in which kernels take them; None for what only sequences of several lengths, or a backward, have.
FORWARD_PARTS = (
    "counts", "indices", "full_counts", "full_indices", None, None, None, "offsets", "full_offsets", "masks", None,
    "work",
)  # fmt: skip
BACKWARD_PARTS = (
    "k_counts", "k_indices", "k_full_counts", "k_full_indices", None, "k_order", "k_full_order", "k_offsets",
    "k_full_offsets", "k_masks", None, None,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Draft:
    """A list that is being made, and may be made again.

    Attributes:
        table: endpoints of rows, [mask_heads, n, B * Sq], int32, contiguous.
        tiles, views: the list, and its parts.
        scratch, bits: what only the stages read, and its parts.
    """

    table: Tensor
    tiles: Tensor
    views: Views
    scratch: Tensor
    bits: Views


class Tiler:
    """Lists tiles for one geometry, on the current device. Raises what the frontend raises for one that it refuses."""

    def __init__(self, geometry: Geometry) -> None:
        from cudnn_flex_compile.engine.frontend import tile_builder

        g = self.geometry = geometry
        builder = self._builder = tile_builder()
        heads = {"num_q_heads": g.heads, "num_kv_heads": g.kv_heads}
        dims = {"arch": ARCHITECTURE, "dtype": g.dtype, "head_dim": g.dim, "head_dim_v": g.value_dim}
        same: dict[str, Any] = {**heads, **dims, "is_varlen": False}
        self._forward = builder.resolve_sm90_fwd_consumer_config(**same, hmask=g.mask_heads, pack_gqa=None)
        self._backward = builder.resolve_sm90_bwd_consumer_config(**same) if g.training else None
        self._list, self._scratch = Layout(), Layout()
        self._place()
        self._stages: dict[str, Any] = {}

    @property
    def size(self) -> int:
        """Of a list, in numbers of 4 bytes."""
        return self._list.size

    def _place(self) -> None:
        g, f, b = self.geometry, self._forward, self._backward
        self._packed = f.qhead_per_kvhead if f.pack_gqa else 1
        self._q_blocks = math.ceil(g.rows * self._packed / f.block_size[0])
        self._k_blocks = math.ceil(g.columns / f.tile_n)
        self._put("", self._q_blocks, self._k_blocks, self._q_blocks, f.num_mask_payload_groups, f)
        self._work = _work_shape(g, g.heads // self._packed, self._q_blocks)
        self._list.put("work", (math.prod(self._work[:4]), 4))
        self._scratch.put("invalid", (1,), torch.uint32)
        if b is not None:
            q_blocks = self._q_blocks_b = math.ceil(g.rows / b.sparse_tile_m)
            k_blocks = self._k_blocks_b = math.ceil(g.columns / b.tile_n)
            self._put("k_", q_blocks, k_blocks, k_blocks, b.num_mma_threads, b)
            for name in ("k_order", "k_full_order"):
                self._list.put(name, self._list.parts["k_indices"].shape)
            for name in ("q_counts", "q_full_counts"):
                self._scratch.put(name, (g.mask_heads, g.batch * q_blocks))

    def _put(self, prefix: str, q_blocks: int, k_blocks: int, outer: int, groups: int, config: Any) -> None:
        """Counts and offsets of tiles by row of tiles, their indices, and the bits of those that are not full.

        Args:
            outer: rows of tiles, which are columns of them in the backward.
        """
        heads, batch = self.geometry.mask_heads, self.geometry.batch
        rows, every = batch * outer, heads * batch * q_blocks * k_blocks
        count = heads * rows
        counts, offsets = (self._list.put(f"{prefix}{name}", (2, 1 + count)) for name in ("zero_counts", "sums"))
        for i, kind in enumerate(("", "full_")):  # the offset of each row is the sum of a zero and what is before it
            self._list.put_within(f"{prefix}{kind}counts", counts.start + i * (1 + count) + 1, (heads, rows))
            self._list.put_within(f"{prefix}{kind}offsets", offsets.start + i * (1 + count), (count + 1,))
            self._list.put(f"{prefix}{kind}indices", (every,))
        payload = (config.physical_subtiles, groups, config.payload_padded_words)
        self._list.put(f"{prefix}masks", (every, *payload), torch.uint32)
        for name in ("seen", "full"):
            self._scratch.put(prefix + name, (heads, batch * q_blocks, max(1, -(-k_blocks // 32))), torch.uint32)
        self._scratch.put(f"{prefix}places", (every, 4))

    def views(self, tiles: Tensor) -> Views:
        """The parts of a list, by name."""
        known = _known.get(tiles)
        if known is None or len(known) < len(self._list.parts):
            known = self._list.views(tiles)
            if not torch.cuda.is_current_stream_capturing():  # what is in the pool of a graph must not be kept
                _known[tiles] = known
        return known

    def list(self, table: Tensor) -> Tensor:
        """The list of a mask's tiles; enqueues kernels, and waits for nothing.

        Args:
            table: endpoints of rows, [mask_heads, n, B * Sq], int32, any strides.
        """
        draft = self.draft(table)
        self.fill(draft)
        return draft.tiles

    def draft(self, table: Tensor) -> Draft:
        """Memory for a list, with what is the same for all masks."""
        tiles = torch.zeros(self.size, dtype=torch.int32, device=table.device)
        scratch = torch.empty(self._scratch.size, dtype=torch.int32, device=table.device)
        draft = Draft(table.contiguous(), tiles, self._list.views(tiles), scratch, self._scratch.views(scratch))
        batch, groups, _, heads, _ = self._work
        _, head, entry, rows = draft.views["work"].view(self._work).unbind(-1)
        head.copy_(torch.arange(groups * heads, device=table.device).view(1, groups, 1, heads))
        entry.copy_(torch.arange(batch, device=table.device).view(batch, 1, 1, 1))
        rows.fill_(self._forward.block_size[0])
        return draft

    def fill(self, draft: Draft, beside: torch.cuda.Stream | None = None) -> None:
        """Makes the list.

        Args:
            beside: a stream for the backward's part of it, which is made at the same time then.
        """
        draft.scratch.zero_()
        with _beside(beside):
            if self.geometry.training:
                self._list_columns(draft)
        self._list_rows(draft)
        if beside is not None:
            torch.cuda.current_stream().wait_stream(beside)

    @property
    def _lengths(self) -> tuple[int, ...]:
        g = self.geometry
        return g.batch, g.rows, g.columns, g.batch * g.rows, g.batch * g.columns

    def _list_rows(self, draft: Draft) -> None:
        """The forward's part."""
        v, s = draft.views, draft.bits
        blocks, width = (self._q_blocks, self._k_blocks), draft.table.shape[1]
        bits = (s["seen"], s["full"], v["counts"], v["full_counts"])
        numbers = (*self._lengths, *blocks, width)
        self._run(
            "classify", "_compile_classify", self._forward, (draft.table, *bits, s["invalid"], *NO_SEQUENCES), numbers
        )
        self._add_up("", draft)
        tensors = (
            draft.table, s["seen"], s["full"], v["offsets"], v["indices"], v["masks"], s["places"], v["full_offsets"],
            v["full_indices"], *NO_SEQUENCES,
        )  # fmt: skip
        self._run("write", "_compile_materialize", self._forward, tensors, numbers)
        self._order_work(draft)

    def _list_columns(self, draft: Draft) -> None:
        """The backward's part."""
        v, s, config = draft.views, draft.bits, self._backward
        blocks, width = (self._q_blocks_b, self._k_blocks_b), draft.table.shape[1]
        bits, counts = (s["k_seen"], s["k_full"]), (s["q_counts"], s["q_full_counts"])
        topology = self._builder._ResolvedSm90BwdTopologyConfig(config)
        tensors = (draft.table, *bits, *counts, s["invalid"], *NO_SEQUENCES)
        self._run("k classify", "_compile_classify", topology, tensors, (*self._lengths, *blocks, width))
        tensors = (*bits, v["k_counts"], v["k_full_counts"], None, *NO_SEQUENCES)
        self._run("k count", "_compile_k2q_count", config, tensors, (*self._lengths, blocks[1]))
        self._add_up("k_", draft)
        tensors = (
            draft.table, *bits, *counts, v["k_offsets"], v["k_indices"], v["k_masks"], s["k_places"], v["k_order"],
            v["k_full_offsets"], v["k_full_indices"], v["k_full_order"], None, *NO_SEQUENCES,
        )  # fmt: skip
        self._run("k write", "_compile_k2q_materialize", config, tensors, (*self._lengths, blocks[1], width))

    def _run(self, stage: str, compiler: str, config: Any, tensors: Sequence[Any], numbers: Sequence[int]) -> None:
        """Compiles a stage the first time, by its tensors, and enqueues it."""
        run = self._stages.get(stage)
        if run is None:
            from cudnn_flex_compile.engine.frontend import quiet

            with quiet():
                run = self._stages[stage] = getattr(self._builder, compiler)(config, *tensors)
        run(*tensors, *numbers)

    def _add_up(self, prefix: str, draft: Draft) -> None:
        v = draft.views
        torch.cumsum(v[f"{prefix}zero_counts"], 1, dtype=torch.int32, out=v[f"{prefix}sums"])

    def _order_work(self, draft: Draft) -> None:
        """By heads that share the L2 cache, longest rows of tiles first: block, head, batch entry, how many rows."""
        g, v, (batch, groups, q_blocks, heads, _) = self.geometry, draft.views, self._work
        length = (v["counts"] + v["full_counts"]).view(g.mask_heads, batch, q_blocks)
        order = length.sort(stable=True, dim=-1, descending=True).indices
        by_head = (groups, heads) if g.mask_heads > 1 else (1, 1)
        order, tile = order.view(*by_head, batch, q_blocks).permute(2, 0, 3, 1), self._forward.block_size[0]
        block, _, _, rows = v["work"].view(self._work).unbind(-1)
        block.copy_(order)
        last = g.rows * self._packed - (q_blocks - 1) * tile
        if last < tile:
            rows.copy_(torch.where(order == q_blocks - 1, last, tile))


def _work_shape(g: Geometry, heads: int, q_blocks: int) -> tuple[int, int, int, int, int]:
    """Batch entries, groups of heads, blocks, heads of a group, and 4.

    Args:
        heads: that are scheduled, each `g.kv_heads` th part of which reads the same keys and values.
    """
    together, size = 1, g.columns * (g.dim + g.value_dim) * g.dtype.itemsize
    while g.kv_heads % (2 * together) == 0 and 2 * together * size <= L2_BYTES:
        together *= 2
    groups = g.kv_heads // together
    return g.batch, groups, q_blocks, heads // groups, 4


@contextlib.contextmanager
def _beside(stream: torch.cuda.Stream | None) -> Generator[None]:
    """On another stream, from here on."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield


Arguments = tuple[Tensor | None, ...]


def arguments(views: Views, parts: Sequence[str | None]) -> Arguments:
    """What a kernel takes, FORWARD_PARTS or BACKWARD_PARTS."""
    return tuple(None if name is None else views[name] for name in parts)


@functools.lru_cache(64)
def tiler_of(geometry: Geometry, device: int) -> Tiler:
    """The one of a geometry for a device, which must be the current one."""
    return Tiler(geometry)
