"""A call as stock flex_attention runs it: a pair is visible if its block is listed, and is full or the mask holds.

The ops take a call's BlockMask in this form. block_mask_contract.py says when a call runs so, and inductor.py and
cpu.py run it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cudnn_flex_compile.kernels.block_mask import listed

Given = tuple[Sequence[Tensor], Sequence[int], str]  # as the ops take it: see Stock.of


class Stock(NamedTuple):
    """The arguments of the ops for a call with a BlockMask, beside those of plans.

    Attributes:
        guard: a tensor that tells whether plans, which compute the mask alone, give the same (block_mask_contract.py).
        blocks: kv_num_blocks and kv_indices alone; these and q_num_blocks, q_indices; or the pairs of kv_*,
            full_kv_*, q_* and full_q_*.
        captured: the tensors that the program reads, by position.
        slots: [B or 1, Skv], the place to which each key went, if keys and values come in another order.
        block_sizes: the block sizes of q and kv.
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
        """Reads the ops' arguments: guard, blocks, captured and slots are one list; the layout has their numbers, and
        the block sizes.
        """
        blocks, captured, *block_sizes = layout
        guard, *rest = tensors
        slots = rest[blocks + captured] if len(rest) > blocks + captured else None
        q_block, kv_block = block_sizes
        return Stock(guard, rest[:blocks], rest[blocks : blocks + captured], slots, (q_block, kv_block), program)

    @property
    def chosen_by_device(self) -> bool:
        """Whether the device chooses by the guard, because the host can't read it."""
        return self.guard.dtype is torch.bool

    def detached(self) -> "Stock":
        """The same call, without tensors that require a gradient."""
        return self._replace(captured=[t.detach() for t in self.captured])

    def own_order(self, keys: Tensor) -> Tensor:
        """Keys or values as the user gave them."""
        return keys if self.slots is None else torch.gather(keys, 2, _positions(self.slots, keys))

    def given_order(self, keys: Tensor) -> Tensor:
        """Keys or values in the order in which the op gets them: the inverse of `own_order`."""
        return keys if self.slots is None else torch.gather(keys, 2, _positions(self.slots.argsort(-1), keys))

    def where_plans_are_wrong(self) -> "Stock":
        """The same call, with no block at all where the guard says that a plan is right."""
        wrong = (~self.guard).to(torch.int32)
        return self._replace(blocks=[t if i % 2 else t * wrong for i, t in enumerate(self.blocks)])

    def named_blocks(self) -> dict[str, Tensor | None]:
        """The blocks by their names in a BlockMask."""
        names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices",
                 "full_q_num_blocks", "full_q_indices")  # fmt: skip
        there = names if len(self.blocks) == 8 else [n for n in names if not n.startswith("full")]
        return {**dict.fromkeys(names), **dict(zip(there, self.blocks, strict=False))}

    def listed_pairs(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each pair is in a partial block, and whether it is in a full one, [B or 1, H or 1, R, Skv].

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
