"""Orders the rows of tiles for the forward's kernel: by heads that share the L2 cache, the longest first.

tiler.py counts the tiles. The frontend's stage that orders the work runs on one thread; torch does it here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cudnn_flex_compile.engine.tiles.tile_list import Geometry

L2_BYTES = 50 * 2**20  # bytes of keys and values that the blocks of threads read at one time


@dataclass(frozen=True, slots=True)
class WorkOrder:
    """Entries of 4 numbers: block, head, batch entry, and the number of rows.

    Attributes:
        geometry: the list's geometry.
        packed: the number of heads, which share keys and values, in one block.
        q_blocks: the number of rows of tiles.
        tile: the number of query rows of a tile.
    """

    geometry: Geometry
    packed: int
    q_blocks: int
    tile: int

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """The shape of the work: batch entries, groups of heads, blocks, heads of a group, and 4."""
        g, heads = self.geometry, self.geometry.heads // self.packed
        together, size = 1, g.columns * (g.dim + g.value_dim) * g.dtype.itemsize
        while g.kv_heads % (2 * together) == 0 and 2 * together * size <= L2_BYTES:
            together *= 2
        groups = g.kv_heads // together
        return g.batch, groups, self.q_blocks, heads // groups, 4

    def prepare(self, work: Tensor) -> None:
        """Writes the numbers that are the same for all masks."""
        batch, groups, _, heads, _ = self.shape
        _, head, entry, rows = work.view(self.shape).unbind(-1)
        head.copy_(torch.arange(groups * heads, device=work.device).view(1, groups, 1, heads))
        entry.copy_(torch.arange(batch, device=work.device).view(batch, 1, 1, 1))
        rows.fill_(self.tile)

    def write(self, work: Tensor, counts: Tensor, full_counts: Tensor) -> None:
        """Orders the blocks by their numbers of tiles."""
        g, (batch, groups, q_blocks, heads, _) = self.geometry, self.shape
        length = (counts + full_counts).view(g.mask_heads, batch, q_blocks)
        order = length.sort(stable=True, dim=-1, descending=True).indices
        by_head = (groups, heads) if g.mask_heads > 1 else (1, 1)
        order = order.view(*by_head, batch, q_blocks).permute(2, 0, 3, 1)
        block, _, _, rows = work.view(self.shape).unbind(-1)
        block.copy_(order)
        last = g.rows * self.packed - (q_blocks - 1) * self.tile
        if last < self.tile:
            rows.copy_(torch.where(order == q_blocks - 1, last, self.tile))
