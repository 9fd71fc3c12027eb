"""BlockMasks of torch's own making, the programs of their mask_mods, and the contract by brute force."""

import functools
import itertools

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from cudnn_flex_compile.passes.write.operands import operand_value
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.partition import partition
from cudnn_flex_compile.scoremod.ranges import narrow
from cudnn_flex_compile.scoremod.simplify import normalize
from cudnn_flex_compile.scoremod.trace import Captured, trace
from tests.support.evaluate import CPU

LENGTHS = torch.tensor([70, 200], dtype=torch.int32)
DOCUMENTS = torch.arange(400) // 90
MASKS = {
    "causal": (lambda b, h, q, kv: q >= kv, ()),
    "window": (lambda b, h, q, kv: (q >= kv) & (q - kv <= 70), ()),
    "everything": (lambda b, h, q, kv: q >= 0, ()),
    "nothing": (lambda b, h, q, kv: q < 0, ()),
    "per head": (lambda b, h, q, kv: q + 64 * h >= kv, ()),
    "per batch": (lambda b, h, q, kv: (q >= kv) | (kv < 100 * b), ()),
    "lengths": (lambda b, h, q, kv, lengths: (q >= kv) & (kv < lengths[b]), (LENGTHS,)),
    "documents": (lambda b, h, q, kv, ids: (ids[q] == ids[kv]) & (q >= kv), (DOCUMENTS,)),
    "every other": (lambda b, h, q, kv: (q + kv) % 2 == 0, ()),
}
SIZES = [(2, 2, 256, 256), (2, 1, 200, 256), (1, 2, 130, 77), (2, 2, 128, 300), (1, 1, 1, 130)]
BLOCKS = [(128, 128), (64, 64), (128, 64)]


@functools.cache
def over_captures(name: str) -> ir.Program:
    """The program of a mask, over what it captures."""
    function, tensors = MASKS[name]
    leaves = [ir.capture(i, {torch.int32: "i32", torch.int64: "i64"}[t.dtype]) for i, t in enumerate(tensors)]
    captured = [Captured(t, leaf) for t, leaf in zip(tensors, leaves, strict=True)]
    return normalize(ir.program(mask=narrow(trace(function, False, captured, CPU))))


@functools.cache
def compiled(name: str, sizes: tuple[int, ...]):
    """The same over operands, and these."""
    tensors = MASKS[name][1]
    program, hoisted = partition(over_captures(name))
    return program, [operand_value(h, lambda leaf: tensors[leaf.value], sizes, CPU) for h in hoisted]


@functools.cache
def dense(name: str, sizes: tuple[int, ...]) -> torch.Tensor:
    """[B, H, Sq, Skv] by the user's own function."""
    function, tensors = MASKS[name]
    where = [torch.arange(n).view([-1 if i == d else 1 for i in range(4)]) for d, n in enumerate(sizes)]
    return function(*where, *tensors).expand(sizes)


def stock(name: str, sizes: tuple[int, ...], block: tuple[int, int], broadcast: bool = False) -> BlockMask:
    function, tensors = MASKS[name]
    batch, heads = (None, None) if broadcast else sizes[:2]
    return create_block_mask(
        lambda b, h, q, kv: function(b, h, q, kv, *tensors), batch, heads, *sizes[2:], "cpu", BLOCK_SIZE=block
    )


NAMES = (
    "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices",
    "full_q_num_blocks", "full_q_indices",
)  # fmt: skip


def tensors_of(mask: BlockMask) -> list[torch.Tensor]:
    """As passes/write/block_mask_guards.py passes them on."""
    return [t for t in (getattr(mask, name) for name in NAMES) if t is not None]


def brute_force(mask: BlockMask, visible: torch.Tensor, block: tuple[int, int]) -> bool:
    """Block by block, in Python."""
    batch, heads, length, columns = visible.shape
    rows, cols = -(-length // block[0]), -(-columns // block[1])
    for b, h, i in itertools.product(range(batch), range(heads), range(rows)):
        kinds = {}
        for kind, count, index in (
            ("partial", "kv_num_blocks", "kv_indices"),
            ("full", "full_kv_num_blocks", "full_kv_indices"),
        ):
            if getattr(mask, count) is not None:
                near = [min(x, n - 1) for x, n in zip((b, h), getattr(mask, count).shape, strict=False)]
                listed = getattr(mask, index)[near[0], near[1], i, : int(getattr(mask, count)[near[0], near[1], i])]
                if kinds.keys() & set(listed.tolist()):  # stock counts the pairs of a block in both lists twice
                    return False
                kinds.update(dict.fromkeys(listed.tolist(), kind))
        for j in range(cols):
            pairs = visible[b, h, i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            wrong = pairs.any() if j not in kinds else kinds[j] == "full" and not pairs.all()
            if wrong:
                return False
    return True


def from_pattern(partial: np.ndarray, full: np.ndarray | None, block: int, sizes: tuple[int, ...]) -> BlockMask:
    """BlockMask.from_kv_blocks from [B, H, rows, columns] booleans."""

    def ordered(pattern: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        count = torch.tensor(pattern.sum(-1), dtype=torch.int32)
        return count, torch.tensor(np.argsort(~pattern, axis=-1, kind="stable"), dtype=torch.int32)

    more = (None, None) if full is None else ordered(full)
    return BlockMask.from_kv_blocks(*ordered(partial), *more, BLOCK_SIZE=block, seq_lengths=sizes[2:])


CAUSAL = np.tril(np.ones((2, 2), dtype=bool))[None, None]
STRICT = np.tril(np.ones((2, 2), dtype=bool), -1)[None, None]
