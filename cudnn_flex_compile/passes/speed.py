"""Which calls stock flex_attention runs faster, as measured.

Knows nothing of numbers' correctness. Each rule states the command that shows it.
"""

from collections.abc import Callable

import torch
from torch.fx import Node

from cudnn_flex_compile.kernels.block_mask import listed
from cudnn_flex_compile.passes.find import Call
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod.ir import TRUE, Program
from cudnn_flex_compile.scoremod.masks.form import split

# A mask that is no conjunction of bounds is computed in every tile, while stock flex_attention skips the blocks
# that its BlockMask omits. Below this share of listed blocks, skipping wins.
# (python3 -m tests.gpu.bench --mods prefix-LM --lower always)
DENSE_SHARE = 0.75


def slower(call: Call, program: Program, real: Callable[[Node], torch.Tensor | None]) -> Reason | None:
    """A reason to keep the call, or None. `real` gives the tensor of an input of the graph."""
    if not call.blocks or split(program.mask).residual is TRUE:
        return None
    pairs = [pair for pair in (call.blocks[:2], call.blocks[2:4]) if None not in pair]
    tensors = [[real(block) for block in pair] for pair in pairs]  # pyright: ignore[reportArgumentType]
    if any(t is None for pair in tensors for t in pair):
        return Reason(Code.SLOWER, "a mask without tile skipping, under a BlockMask made in the graph")
    with torch.no_grad():
        masks = [listed(count, indices, indices.shape[-1]) for count, indices in tensors]  # pyright: ignore
        share = float(sum(float(m.float().mean()) for m in masks))
    if share >= DENSE_SHARE:
        return None
    return Reason(Code.SLOWER, f"a mask without tile skipping, of which the BlockMask lists {share:.0%} of the blocks")
