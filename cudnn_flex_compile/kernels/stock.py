"""A call as stock flex_attention runs it: a pair is visible if its block is listed, and is full or the mask holds.

Knows nothing of plans, nor of when a call runs like this (contract.py).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cudnn_flex_compile.kernels.block_mask import listed

Given = tuple[Sequence[Tensor], Sequence[int], str]  # as the ops take it: see Stock.of


class Stock(NamedTuple):
    """What the ops take of a call with a BlockMask, beside what plans take.

    Attributes:
        guard: by which it is known whether plans, which compute the mask alone, give the same (contract.py).
        blocks: kv_num_blocks and kv_indices alone; these and q_num_blocks, q_indices; or the pairs of kv_*,
            full_kv_*, q_* and full_q_*.
        captured: the tensors that the program reads, by position.
        slots: [B or 1, Skv], the place to which each key went, if keys and values come in another order.
        block_sizes: of q and kv.
        program: canonical text, over keys in their own order. Its mask is the mask_mod, and nothing else; it reads the
            operands, integers and floats that the op takes.
    """

    guard: Tensor
    blocks: Sequence[Tensor]
    captured: Sequence[Tensor]
    slots: Tensor | None
    block_sizes: tuple[int, int]
    program: str

    @staticmethod
    def of(tensors: Sequence[Tensor], layout: Sequence[int], program: str) -> "Stock":
        """From the ops' arguments: guard, blocks, captured and slots in one list, and how many of these, and sizes."""
        blocks, captured, *block_sizes = layout
        guard, *rest = tensors
        slots = rest[blocks + captured] if len(rest) > blocks + captured else None
        q_block, kv_block = block_sizes
        return Stock(guard, rest[:blocks], rest[blocks : blocks + captured], slots, (q_block, kv_block), program)

    @property
    def chosen_by_device(self) -> bool:
        """Whether the guard is what the device chooses by, for the host can't read it."""
        return self.guard.dtype is torch.bool

    def detached(self) -> "Stock":
        """The same, with nothing that requires a gradient."""
        return self._replace(captured=[t.detach() for t in self.captured])

    def own_order(self, keys: Tensor) -> Tensor:
        """Keys or values as the user gave them."""
        return keys if self.slots is None else torch.gather(keys, 2, _positions(self.slots, keys))

    def given_order(self, keys: Tensor) -> Tensor:
        """The inverse."""
        return keys if self.slots is None else torch.gather(keys, 2, _positions(self.slots.argsort(-1), keys))

    def where_plans_are_wrong(self) -> "Stock":
        """The same, with no block at all where the guard says that a plan is right."""
        wrong = (~self.guard).to(torch.int32)
        return self._replace(blocks=[t if i % 2 else t * wrong for i, t in enumerate(self.blocks)])

    def named_blocks(self) -> dict[str, Tensor | None]:
        """By the names that a BlockMask has for them."""
        names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices",
                 "full_q_num_blocks", "full_q_indices")  # fmt: skip
        there = names if len(self.blocks) == 8 else [n for n in names if not n.startswith("full")]
        return {**dict.fromkeys(names), **dict(zip(there, self.blocks, strict=False))}

    def listed_pairs(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Which pairs are in partial blocks, and which in full ones: [B or 1, H or 1, R, Skv].

        Args:
            rows, columns: the indices of query rows [R] and of all keys [Skv].
        """
        q, kv = rows // self.block_sizes[0], columns // self.block_sizes[1]
        width = -(-len(columns) // self.block_sizes[1])

        def pairs(count: Tensor, indices: Tensor) -> Tensor:
            return listed(count, indices, width)[:, :, q][..., kv]

        partial = pairs(self.blocks[0], self.blocks[1])
        full = pairs(self.blocks[2], self.blocks[3]) if len(self.blocks) == 8 else torch.zeros_like(partial)
        return partial, full


def _positions(places: Tensor, keys: Tensor) -> Tensor:
    return places[:, None, :, None].expand(keys.shape)
