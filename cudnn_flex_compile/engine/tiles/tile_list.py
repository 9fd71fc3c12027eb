"""A list of the tiles in which a mask shows any pair, as cudnn.flex_attention's kernels take it, in one tensor.

tiler.py makes lists, and plan.py runs by them. A list is for one geometry. Its first part serves the forward; a second
one, in training, the backward. Tiles with some hidden pairs are partial, and have a bit for each pair; the others are
full.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cudnn_flex_compile.engine.problem import Problem
from cudnn_flex_compile.engine.tiles.layout import Layout
from cudnn_flex_compile.scoremod import ir

NAME = "tile_lists"  # the name of the strategy that runs by a list
ARCHITECTURE = 90  # the stages and their shapes were read, and measured, for this one
ITEMSIZE = 4
STEP = 64  # room is a multiple of so many tiles, so that masks that are alike have the same
# The order in which kernels take the parts; None for parts that only sequences of several lengths, or a backward, have.
FORWARD_PARTS = (
    "counts", "indices", "full_counts", "full_indices", None, None, None, "offsets", "full_offsets", "masks", None,
    "work",
)  # fmt: skip
BACKWARD_PARTS = (
    "k_counts", "k_indices", "k_full_counts", "k_full_indices", None, "k_order", "k_full_order", "k_offsets",
    "k_full_offsets", "k_masks", None, None,
)  # fmt: skip
Arguments = tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class Geometry:
    """The properties of a call that its list of tiles depends on beside the mask: sizes, training, and the dtype.

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
        return [*self.sizes, self.kv_heads, self.dim, self.value_dim, self.mask_heads, int(self.training)]

    @staticmethod
    def of(numbers: Sequence[int], dtype: torch.dtype) -> "Geometry":
        """The geometry of all numbers but the dtype, in the order in which the op takes them."""
        batch, heads, rows, columns, kv_heads, dim, value_dim, mask_heads, training = numbers
        return Geometry(batch, heads, kv_heads, rows, columns, dim, value_dim, mask_heads, bool(training), dtype)


def geometry_of(problem: Problem, training: bool) -> Geometry:
    batch, heads, rows, dim = problem.query.shape
    by_head = problem.tiled > 1 or "h" in ir.axes_of(problem.program.mask)
    return Geometry(
        batch=batch, heads=heads, kv_heads=problem.key.shape[1], rows=rows, columns=problem.key.shape[2], dim=dim,
        value_dim=problem.value.shape[3], mask_heads=heads if by_head else 1, training=training,
        dtype=problem.query.dtype,
    )  # fmt: skip


class Room(NamedTuple):
    """Numbers of tiles: partial and full ones by rows, and the same by columns, which a backward takes."""

    partial: int = 0
    full: int = 0
    k_partial: int = 0
    k_full: int = 0

    def holds(self, needed: "Room") -> bool:
        return all(mine >= its for mine, its in zip(self, needed, strict=True))

    def is_wide_for(self, needed: "Room") -> bool:
        """Whether most of the room would stay empty."""
        return sum(self) > 4 * sum(needed) + 16 * STEP

    def with_reserve(self) -> "Room":
        """The room with a quarter more, which the next step may need."""
        return Room(*(-(-(n * 5 // 4 + 1) // STEP) * STEP for n in self))


@dataclass(eq=False)
class TileList:
    """One list.

    Attributes:
        numbers: the whole list, int32, 1-d.
        layout: the places of its parts.
    """

    numbers: Tensor
    layout: Layout

    @functools.cached_property
    def forward(self) -> Arguments:
        """The parts that the forward's kernel takes."""
        return self._arguments(FORWARD_PARTS)

    @functools.cached_property
    def backward(self) -> Arguments:
        """The parts that the backward's kernels take, if the list is for training."""
        return self._arguments(BACKWARD_PARTS)

    def _arguments(self, names: Sequence[str | None]) -> Arguments:
        parts = self.layout.parts
        return tuple(None if name is None else parts[name].of(self.numbers) for name in names)
