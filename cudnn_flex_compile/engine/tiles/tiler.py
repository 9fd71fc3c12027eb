"""Makes lists of tiles (tile_list.py) from the endpoints of a mask's rows, in memory for as many tiles as there are.

kernels/list_making.py calls it with a table of endpoints (scoremod/masks/intervals.py). Stages of the frontend find the
tiles and write their bits. They are private: where one is missing, or takes other arguments, there is no plan, and
their lists are certified with the kernels that read them. The frontend's stages that add counts up run on one
thread; torch does that here.

A list is made in two steps: tiles are counted, and then written. In between the host may read the counts (`exact`), or
memory is given beforehand (`fill`), and then nothing is written where there are more tiles than it holds.
"""

import contextlib
import functools
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.engine.tiles import ahead
from cudnn_flex_compile.engine.tiles.layout import Layout, Views, dense
from cudnn_flex_compile.engine.tiles.tile_list import ARCHITECTURE, Geometry, Room, TileList
from cudnn_flex_compile.engine.tiles.units import stages
from cudnn_flex_compile.engine.tiles.work_order import WorkOrder

NO_SEQUENCES = (None, None, None)  # all sequences have one length


@dataclass(frozen=True, slots=True)
class Draft:
    """A list that is being made, and may be made again.

    Attributes:
        table: endpoints of rows, [mask_heads, n, B * Sq], int32, contiguous.
        room: the number of tiles that fit into the memory.
        listed: the list.
        scratch: memory that only the stages read.
        views: the parts of both.
    """

    table: Tensor
    room: Room
    listed: TileList
    scratch: Tensor
    views: Views


class Tiler:
    """Lists tiles for one geometry, on the current device. Raises the frontend's error for one that it refuses."""

    def __init__(self, geometry: Geometry) -> None:
        from cudnn_flex_compile.engine.frontend import tile_builder

        g = self.geometry = geometry
        builder = self._builder = tile_builder()
        heads = {"num_q_heads": g.heads, "num_kv_heads": g.kv_heads}
        dims = {"arch": ARCHITECTURE, "dtype": g.dtype, "head_dim": g.dim, "head_dim_v": g.value_dim}
        same: dict[str, Any] = {**heads, **dims, "is_varlen": False}
        self._forward = builder.resolve_sm90_fwd_consumer_config(**same, hmask=g.mask_heads, pack_gqa=None)
        self._backward = builder.resolve_sm90_bwd_consumer_config(**same) if g.training else None
        self._counts, self._scratch = Layout(), Layout()
        self._place()
        self._stages: dict[str, Any] = {}

    @property
    def every_tile(self) -> Room:
        """Room for any mask."""
        heads, batch = self.geometry.mask_heads, self.geometry.batch
        forward = heads * batch * self._q_blocks * self._k_blocks
        backward = 0 if self._backward is None else heads * batch * self._q_blocks_b * self._k_blocks_b
        return Room(forward, forward, backward, backward)

    def size(self, room: Room) -> int:
        """The size of a list with this room, in numbers of 4 bytes."""
        return self._layouts(room)[0].size

    def _place(self) -> None:
        g, f, b = self.geometry, self._forward, self._backward
        packed = f.qhead_per_kvhead if f.pack_gqa else 1
        self._q_blocks = math.ceil(g.rows * packed / f.block_size[0])
        self._k_blocks = math.ceil(g.columns / f.tile_n)
        self._work = WorkOrder(g, packed, self._q_blocks, f.block_size[0])
        self._put("", self._q_blocks, self._k_blocks, self._q_blocks)
        self._counts.put("work", (math.prod(self._work.shape[:4]), 4))
        self._scratch.put("invalid", (1,), torch.uint32)
        if b is not None:
            q_blocks = self._q_blocks_b = math.ceil(g.rows / b.sparse_tile_m)
            k_blocks = self._k_blocks_b = math.ceil(g.columns / b.tile_n)
            self._put("k_", q_blocks, k_blocks, k_blocks)
            for name in ("q_counts", "q_full_counts"):
                self._scratch.put(name, (g.mask_heads, g.batch * q_blocks))

    def _put(self, prefix: str, q_blocks: int, k_blocks: int, outer: int) -> None:
        """Lays out the counts and offsets of tiles by row of tiles, and the bits by which tiles are found.

        Args:
            outer: rows of tiles, which are columns of them in the backward.
        """
        heads, batch = self.geometry.mask_heads, self.geometry.batch
        rows = batch * outer
        count = heads * rows
        counts, offsets = (self._counts.put(f"{prefix}{name}", (2, 1 + count)) for name in ("zero_counts", "sums"))
        for i, kind in enumerate(("", "full_")):  # the offset of each row is the sum of a zero and the counts before it
            self._counts.put_within(f"{prefix}{kind}counts", counts.start + i * (1 + count) + 1, (heads, rows))
            self._counts.put_within(f"{prefix}{kind}offsets", offsets.start + i * (1 + count), (count + 1,))
        bits = (heads, batch * q_blocks, max(1, -(-k_blocks // 32)))
        seen, full = (self._scratch.put(prefix + name, bits, torch.uint32) for name in ("seen", "full"))
        self._scratch.put_within(f"{prefix}bits", seen.start, (full.end - seen.start,))

    def _layouts(self, room: Room) -> tuple[Layout, Layout]:
        """The layouts of a list, and of the memory to make it: parts that depend on the room come last."""
        listed, scratch = self._counts.copy(), self._scratch.copy()
        f, b = self._forward, self._backward
        sides = [("", f, f.num_mask_payload_groups, room.partial, room.full)]
        sides += [] if b is None else [("k_", b, b.num_mma_threads, room.k_partial, room.k_full)]
        for prefix, config, groups, partial, full in sides:
            orders = ("indices", "order") if prefix else ("indices",)
            for name in orders:
                listed.put(f"{prefix}{name}", (partial,))
                listed.put(f"{prefix}full_{name}", (full,))
            payload = (config.physical_subtiles, groups, config.payload_padded_words)
            listed.put(f"{prefix}masks", (partial, *payload), torch.uint32)
            scratch.put(f"{prefix}places", (partial, 4))
        return listed, scratch

    def count(self, table: Tensor) -> tuple[Draft, Room]:
        """A list without tiles, and the number of tiles. Waits for the device.

        Args:
            table: endpoints of rows, [mask_heads, n, B * Sq], int32, any strides.
        """
        counted = self.draft(table, Room())
        self._count_columns(counted)
        self._count_rows(counted)
        return counted, Room(*self.needed(counted).tolist())

    def write(self, counted: Draft, room: Room) -> TileList:
        """The list whose tiles were counted, in room for as many at least."""
        draft = self.draft(counted.table, Room(*(max(1, n) for n in room)))
        for of, here, layout in (
            (draft.listed.numbers, counted.listed.numbers, self._counts),
            (draft.scratch, counted.scratch, self._scratch),
        ):
            of[: layout.size].copy_(here[: layout.size])
        self._write_columns(draft)
        self._write_rows(draft)
        return draft.listed

    def exact(self, table: Tensor, most: int | None = None) -> TileList | None:
        """The list, with room for its tiles alone; None where it has more than `most` numbers. Waits for the device."""
        counted, room = self.count(table)
        return None if most is not None and self.size(room) > most else self.write(counted, room)

    def within(self, table: Tensor, room: Room) -> tuple[TileList, Tensor]:
        """The list, if there is room for it, and the number of tiles (`needed`). Waits for nothing."""
        draft = self.draft(table, room)
        self.fill(draft)
        return draft.listed, self.needed(draft)

    def needed(self, draft: Draft) -> Tensor:
        """The number of tiles that were counted, in the order of a Room, int32."""
        sides = ("sums", "k_sums") if self.geometry.training else ("sums",)
        return torch.cat([draft.views[name].select(1, -1) for name in sides])

    def draft(self, table: Tensor, room: Room) -> Draft:
        """Memory for a list, with the parts that are the same for all masks."""
        listed_at, scratch_at = self._layouts(room)
        numbers = torch.zeros(listed_at.size, dtype=torch.int32, device=table.device)
        scratch = torch.zeros(scratch_at.size, dtype=torch.int32, device=table.device)
        views = {**listed_at.views(numbers), **scratch_at.views(scratch)}
        self._work.prepare(views["work"])
        return Draft(dense(table), room, TileList(numbers, listed_at), scratch, views)

    def fill(self, draft: Draft, beside: torch.cuda.Stream | None = None) -> None:
        """Makes the list in the memory that there is.

        Args:
            beside: a stream for the backward's part of the list, which is made at the same time then.
        """
        draft.scratch.zero_()
        with _beside(beside):
            self._count_columns(draft)
            self._forget_what_has_no_room("k_", draft, draft.room[2:])
            self._write_columns(draft)
        self._count_rows(draft)
        self._forget_what_has_no_room("", draft, draft.room[:2])
        self._write_rows(draft)
        if beside is not None:
            torch.cuda.current_stream().wait_stream(beside)

    def _forget_what_has_no_room(self, prefix: str, draft: Draft, room: Sequence[int]) -> None:
        """Zeroes the counts where there are more tiles than the memory holds, so that nothing is written beyond it."""
        if f"{prefix}sums" in draft.views:
            partial, full = draft.views[f"{prefix}sums"].select(1, -1).unbind()
            draft.views[f"{prefix}bits"].mul_((partial <= room[0]) & (full <= room[1]))

    @property
    def _lengths(self) -> tuple[int, ...]:
        g = self.geometry
        return g.batch, g.rows, g.columns, g.batch * g.rows, g.batch * g.columns

    def _count_rows(self, draft: Draft) -> None:
        v, blocks = draft.views, (self._q_blocks, self._k_blocks)
        tensors = (
            draft.table, v["seen"], v["full"], v["counts"], v["full_counts"], v["invalid"], *NO_SEQUENCES,
        )  # fmt: skip
        numbers = (*self._lengths, *blocks, draft.table.shape[1])
        self._run("classify", "_compile_classify", self._forward, tensors, numbers)
        self._add_up("", draft)

    def _write_rows(self, draft: Draft) -> None:
        v, blocks = draft.views, (self._q_blocks, self._k_blocks)
        tensors = (
            draft.table, v["seen"], v["full"], v["offsets"], v["indices"], v["masks"], v["places"], v["full_offsets"],
            v["full_indices"], *NO_SEQUENCES,
        )  # fmt: skip
        numbers = (*self._lengths, *blocks, draft.table.shape[1])
        self._run("write", "_compile_materialize", self._forward, tensors, numbers)

    def _count_columns(self, draft: Draft) -> None:
        config = self._backward
        if config is None:
            return
        v, blocks, width = draft.views, (self._q_blocks_b, self._k_blocks_b), draft.table.shape[1]
        bits, counts = (v["k_seen"], v["k_full"]), (v["q_counts"], v["q_full_counts"])
        topology = self._builder._ResolvedSm90BwdTopologyConfig(config)
        tensors = (draft.table, *bits, *counts, v["invalid"], *NO_SEQUENCES)
        self._run("k classify", "_compile_classify", topology, tensors, (*self._lengths, *blocks, width))
        tensors = (*bits, v["k_counts"], v["k_full_counts"], None, *NO_SEQUENCES)
        self._run("k count", "_compile_k2q_count", config, tensors, (*self._lengths, blocks[1]))
        self._add_up("k_", draft)

    def _write_columns(self, draft: Draft) -> None:
        config = self._backward
        if config is None:
            return
        v, columns, width = draft.views, self._k_blocks_b, draft.table.shape[1]
        tensors = (
            draft.table, v["k_seen"], v["k_full"], v["q_counts"], v["q_full_counts"], v["k_offsets"], v["k_indices"],
            v["k_masks"], v["k_places"], v["k_order"], v["k_full_offsets"], v["k_full_indices"], v["k_full_order"],
            None, *NO_SEQUENCES,
        )  # fmt: skip
        self._run("k write", "_compile_k2q_materialize", config, tensors, (*self._lengths, columns, width))

    def _run(self, stage: str, compiler: str, config: Any, tensors: Sequence[Any], numbers: Sequence[int]) -> None:
        """Compiles a stage the first time, by its tensors, and enqueues it."""
        run = self._stages.get(stage)
        if run is None:
            from cudnn_flex_compile.engine.frontend import quiet

            direction = BACKWARD if stage.startswith("k ") else FORWARD
            with ahead.awaited(stages(self.geometry, direction)), quiet():
                run = self._stages[stage] = getattr(self._builder, compiler)(config, *tensors)
        run(*tensors, *numbers)

    def _add_up(self, prefix: str, draft: Draft) -> None:
        """Writes the sums of the counts, and the forward's work in the order of these."""
        v = draft.views
        torch.cumsum(v[f"{prefix}zero_counts"], 1, dtype=torch.int32, out=v[f"{prefix}sums"])
        if not prefix:
            self._work.write(v["work"], v["counts"], v["full_counts"])


@contextlib.contextmanager
def _beside(stream: torch.cuda.Stream | None) -> Generator[None]:
    """Enters another stream, if there is one, which starts after the work so far."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield


@functools.lru_cache(64)
def tiler_of(geometry: Geometry, device: int) -> Tiler:
    """The tiler of a geometry for a device, which must be the current one."""
    return Tiler(geometry)
