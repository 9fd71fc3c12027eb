"""Lists the tiles in which a mask shows any pair, as cudnn.flex_attention's kernels take them, in one tensor.

Knows nothing of programs: it takes the endpoints of rows (scoremod/masks/intervals.py). The frontend's own
`create_mask_plan` looks at what the device counted, and allocates so much, in tensors of their own. Here the list has
room for all tiles, and so it is one tensor, of a shape that a compiled graph knows, and the host looks at nothing. The
stages are the frontend's. They are private: one that is missing, or takes other arguments, means that there is no plan
(engine/tile_plan.py), and what they list is certified with the kernels that read it.

The list is for one geometry. Its first part serves the forward; a second one, in training, the backward.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

NAME = "intervals"  # of the strategy that runs by a list
ARCHITECTURE = 90  # the stages and their shapes were read, and measured, for this one
ALIGNED = 32  # numbers of 4 bytes: the kernels read 16 bytes at a time
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


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a list: where it starts, in numbers of 4 bytes."""

    shape: tuple[int, ...]
    start: int
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[d + 1 :]) for d in range(len(self.shape)))

    def of(self, storage: torch.UntypedStorage) -> Tensor:
        """The tensor, which keeps the storage alive, but not the list as a tensor."""
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.start, self.shape, self.strides)


Views = dict[str, Tensor]
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
    """A list that is being made.

    Attributes:
        table: endpoints of rows.
        views: of the list.
        scratch: what only the stages read.
    """

    table: Tensor
    views: Views
    scratch: Views


class Tiler:
    """Lists tiles for one geometry, on the current device. Raises what the frontend raises for one that it refuses."""

    def __init__(self, geometry: Geometry) -> None:
        from cudnn.flex_attention.plan import builder

        g = self.geometry = geometry
        self._builder: Any = builder
        heads = {"num_q_heads": g.heads, "num_kv_heads": g.kv_heads}
        dims = {"arch": ARCHITECTURE, "dtype": g.dtype, "head_dim": g.dim, "head_dim_v": g.value_dim}
        same: dict[str, Any] = {**heads, **dims, "is_varlen": False}
        self._forward = builder.resolve_sm90_fwd_consumer_config(**same, hmask=g.mask_heads, pack_gqa=None)
        self._backward = builder.resolve_sm90_bwd_consumer_config(**same) if g.training else None
        self._parts: dict[str, Part] = {}
        self._place()
        self._stages: dict[str, Any] = {}

    @property
    def size(self) -> int:
        """Of a list, in numbers of 4 bytes."""
        return max(part.end for part in self._parts.values())

    def _place(self) -> None:
        g, f, b = self.geometry, self._forward, self._backward
        packed = f.qhead_per_kvhead if f.pack_gqa else 1
        self._q_blocks, self._k_blocks = math.ceil(g.rows * packed / f.block_size[0]), math.ceil(g.columns / f.tile_n)
        self._q_blocks_b = self._k_blocks_b = 0
        rows, every = g.batch * self._q_blocks, g.mask_heads * g.batch * self._q_blocks * self._k_blocks
        scheduled = g.kv_heads if f.pack_gqa else g.heads
        self._add("", rows, every, (f.physical_subtiles, f.num_mask_payload_groups, f.payload_padded_words))
        self._put("work", (rows * scheduled, 4))
        if b is not None:
            self._q_blocks_b, self._k_blocks_b = math.ceil(g.rows / b.sparse_tile_m), math.ceil(g.columns / b.tile_n)
            rows, every = g.batch * self._k_blocks_b, g.mask_heads * g.batch * self._k_blocks_b * self._q_blocks_b
            self._add("k_", rows, every, (b.physical_subtiles, b.num_mma_threads, b.payload_padded_words))
            self._put("k_order", (every,))
            self._put("k_full_order", (every,))

    def _add(self, prefix: str, rows: int, every: int, payload: tuple[int, ...]) -> None:
        """Counts and offsets of tiles by row of tiles, their indices, and the bits of those that are not full."""
        heads = self.geometry.mask_heads
        for kind in ("", "full_"):
            self._put(f"{prefix}{kind}counts", (heads, rows))
            self._put(f"{prefix}{kind}offsets", (heads * rows + 1,))
            self._put(f"{prefix}{kind}indices", (every,))
        self._put(f"{prefix}masks", (every, *payload), torch.uint32)

    def _put(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> None:
        start = -(-max((p.end for p in self._parts.values()), default=0) // ALIGNED) * ALIGNED
        self._parts[name] = Part(shape, start, dtype)

    def views(self, tiles: Tensor) -> Views:
        """The parts of a list, by name."""
        known = _known.get(tiles)
        if known is None or len(known) < len(self._parts):
            storage = tiles.untyped_storage()
            known = {name: part.of(storage) for name, part in self._parts.items()}
            if not torch.cuda.is_current_stream_capturing():  # what is in the pool of a graph must not be kept
                _known[tiles] = known
        return known

    def list(self, table: Tensor) -> Tensor:
        """The list of a mask's tiles; enqueues kernels, and waits for nothing.

        Args:
            table: endpoints of rows, [mask_heads, n, B * Sq], int32, any strides.
        """
        table = table.contiguous()  # the kernels want a last stride of 1
        tiles = torch.empty(self.size, dtype=torch.int32, device=table.device)
        draft = Draft(table, self.views(tiles), self._scratch(table))
        self._count(draft)
        self._write_rows(draft)
        if self.geometry.training:
            self._write_keys(draft)
        self._schedule(draft)
        return tiles

    def _scratch(self, table: Tensor) -> Views:
        g = self.geometry
        found = self._bits("", self._q_blocks, self._k_blocks, table)
        found["invalid"] = self._empty(table, 1, unsigned=True)
        found["header"] = torch.empty(9, dtype=torch.int64, device=table.device)
        found["histogram"] = self._empty(table, g.batch * g.kv_heads, self._k_blocks + 1)
        found["costs"] = torch.empty(g.batch * g.kv_heads, dtype=torch.int64, device=table.device)
        if g.training:
            found |= self._bits("k_", self._q_blocks_b, self._k_blocks_b, table)
            for name in ("q_counts", "q_full_counts"):
                found[name] = self._empty(table, g.mask_heads, g.batch * self._q_blocks_b)
        return found

    def _count(self, draft: Draft) -> None:
        g, v, s = self.geometry, draft.views, draft.scratch
        forward, backward = [s["seen"], s["full"], v["counts"], v["full_counts"]], [None] * 6
        if g.training:
            backward = [s["k_seen"], s["k_full"], s["q_counts"], s["q_full_counts"], v["k_counts"], v["k_full_counts"]]
        of_schedule = (s["invalid"], s["histogram"], s["costs"])
        self._run("init", "_compile_plan_workspace_init", ARCHITECTURE, (*forward, *of_schedule, *backward))
        self._classify("classify", self._forward, forward, draft, self._q_blocks, self._k_blocks)
        if g.training:
            topology = self._builder._ResolvedSm90BwdTopologyConfig(self._backward)
            self._classify("k classify", topology, backward[:4], draft, self._q_blocks_b, self._k_blocks_b)
            counted = (*backward[:2], *backward[4:], None, *NO_SEQUENCES)
            self._run("count", "_compile_k2q_count", self._backward, counted, (*self._lengths, self._k_blocks_b))
        self._scan(draft, backward[4:])

    def _empty(self, table: Tensor, *shape: int, unsigned: bool = False) -> Tensor:
        return torch.empty(shape, dtype=torch.uint32 if unsigned else torch.int32, device=table.device)

    def _bits(self, prefix: str, q_blocks: int, k_blocks: int, table: Tensor) -> Views:
        shape = self.geometry.mask_heads, self.geometry.batch * q_blocks, max(1, -(-k_blocks // 32))
        return {prefix + name: self._empty(table, *shape, unsigned=True) for name in ("seen", "full")}

    @property
    def _lengths(self) -> tuple[int, ...]:
        g = self.geometry
        return g.batch, g.rows, g.columns, g.batch * g.rows, g.batch * g.columns

    def _classify(
        self, stage: str, config: Any, bits: Sequence[Any], draft: Draft, q_blocks: int, k_blocks: int
    ) -> None:
        tensors = (draft.table, *bits, draft.scratch["invalid"], *NO_SEQUENCES)
        numbers = (*self._lengths, q_blocks, k_blocks, draft.table.shape[1])
        self._run(stage, "_compile_classify", config, tensors, numbers)

    def _scan(self, draft: Draft, k_counts: Sequence[Any]) -> None:
        g, v = self.geometry, draft.views
        offsets = (v["k_offsets"], v["k_full_offsets"]) if g.training else (None, None)
        tensors = (
            v["counts"], v["full_counts"], v["offsets"], v["full_offsets"], *k_counts, *offsets, None, None, None, None,
            draft.scratch["invalid"], draft.scratch["header"],
        )  # fmt: skip
        numbers = [g.batch * n for n in (self._q_blocks, self._q_blocks_b, self._k_blocks_b)]
        self._run("scan", "_compile_fixed_scan_header", ARCHITECTURE, tensors, numbers)

    def _run(self, stage: str, compiler: str, config: Any, tensors: Sequence[Any], numbers: Sequence[int] = ()) -> None:
        """Compiles a stage the first time, by its tensors, and enqueues it."""
        run = self._stages.get(stage)
        if run is None:
            run = self._stages[stage] = getattr(self._builder, compiler)(config, *tensors)
        run(*tensors, *numbers)

    def _write_rows(self, draft: Draft) -> None:
        v, s = draft.views, draft.scratch
        tensors = (
            draft.table, s["seen"], s["full"], v["offsets"], v["indices"], v["masks"], _blank(v["indices"]),
            v["full_offsets"], v["full_indices"], *NO_SEQUENCES,
        )  # fmt: skip
        numbers = (*self._lengths, self._q_blocks, self._k_blocks, draft.table.shape[1])
        self._run("write", "_compile_materialize", self._forward, tensors, numbers)

    def _write_keys(self, draft: Draft) -> None:
        v, s = draft.views, draft.scratch
        tensors = (
            draft.table, s["k_seen"], s["k_full"], s["q_counts"], s["q_full_counts"], v["k_offsets"], v["k_indices"],
            v["k_masks"], _blank(v["k_indices"]), v["k_order"], v["k_full_offsets"], v["k_full_indices"],
            v["k_full_order"], None, *NO_SEQUENCES,
        )  # fmt: skip
        numbers = (*self._lengths, self._k_blocks_b, draft.table.shape[1])
        self._run("k write", "_compile_k2q_materialize", self._backward, tensors, numbers)

    def _schedule(self, draft: Draft) -> None:
        g, v, s = self.geometry, draft.views, draft.scratch
        _, work = self._builder._build_forward_schedule(
            self._forward, v["counts"], v["full_counts"], batch_size=g.batch, total_m_blocks=g.batch * self._q_blocks,
            max_m_blocks=self._q_blocks, max_task_cost=self._k_blocks, seqlen_q_fixed=g.rows, seqlen_k_fixed=g.columns,
            head_dim=g.dim, head_dim_v=g.value_dim, element_size=g.dtype.itemsize, cu_seqlens_q=None, cu_seqlens_k=None,
            cu_total_m_blocks=None, schedule_histogram=s["histogram"], schedule_section_cost=s["costs"],
        )  # fmt: skip
        v["work"].copy_(work)


def _blank(indices: Tensor) -> Tensor:
    """Where a stage notes of which tile each payload is. What is not counted stays that of the first tile, which there
    is, and no kernel reads such a payload.
    """
    return indices.new_zeros(indices.shape[0], 4)


Arguments = tuple[Tensor | None, ...]


def arguments(views: Views, parts: Sequence[str | None]) -> Arguments:
    """What a kernel takes, FORWARD_PARTS or BACKWARD_PARTS."""
    return tuple(None if name is None else views[name] for name in parts)


@functools.lru_cache(64)
def tiler_of(geometry: Geometry, device: int) -> Tiler:
    """The one of a geometry for a device, which must be the current one."""
    return Tiler(geometry)
