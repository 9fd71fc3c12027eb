"""The ops that prepare a mask: permuted keys, the comparison of a BlockMask, and the list of a mask's tiles.

Calls with the same mask share their results. The work itself is in kernels/.
"""

from typing import Any

import torch
from torch import Tensor

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.ops.schemas import library


class _PermuteKeys(torch.autograd.Function):
    """A gather whose gradient is the gather by the inverse; autograd's own would add up atomically."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, order: Tensor, slots: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(order, slots)
        return _gathered(keys, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        order, slots = ctx.saved_tensors
        return _PermuteKeys.apply(grad, slots, order), None, None


def _gathered(keys: Tensor, order: Tensor) -> Tensor:
    return torch.gather(keys, 2, order[:, None, :, None].expand(keys.shape))


def _permute_keys(keys: Tensor, order: Tensor, slots: Tensor) -> Tensor:
    """keys[b, h, order[b, i], d], for `slots` the inverse of the permutation `order` [B or 1, Skv]."""
    return _PermuteKeys.apply(keys, order, slots)  # pyright: ignore


library.impl("permute_keys", _permute_keys, "CompositeImplicitAutograd")


def check_block_mask(
    blocks: list[Tensor], captured: list[Tensor], ints: list[int], floats: list[Tensor], program: str,
    sizes: list[int], block_sizes: list[int],
) -> Tensor:  # fmt: skip
    """The guard of the calls with a BlockMask (kernels/block_mask_contract.py), an empty tensor."""
    from cudnn_flex_compile.kernels import block_mask_contract

    return block_mask_contract.guard_of(blocks, captured, ints, floats, program, sizes, block_sizes)


def _check_fake(
    blocks: list[Tensor], captured: list[Tensor], ints: list[int], floats: list[Tensor], program: str,
    sizes: list[int], block_sizes: list[int],
) -> Tensor:  # fmt: skip
    return blocks[0].new_empty(0, dtype=torch.int32)


def list_tiles(
    blocks: list[Tensor], captured: list[Tensor], ints: list[int], floats: list[Tensor], program: str,
    block_sizes: list[int], geometry: list[int], dtype: torch.dtype, device: torch.device, budget: int,
) -> Tensor:  # fmt: skip
    """The handle of the list of a mask's tiles (kernels/tile_lists.py), an empty tensor, by which calls run."""
    from cudnn_flex_compile.kernels import tile_lists

    given = (blocks, captured, ints, floats, program, block_sizes, geometry, dtype, device, budget)
    if device.type != "cuda" or device.index == torch_private.current_device():
        return tile_lists.handle_of(*given)
    with torch.cuda.device(device):
        return tile_lists.handle_of(*given)


def _list_tiles_fake(
    blocks: list[Tensor], captured: list[Tensor], ints: list[int], floats: list[Tensor], program: str,
    block_sizes: list[int], geometry: list[int], dtype: torch.dtype, device: torch.device, budget: int,
) -> Tensor:  # fmt: skip
    return torch.empty(0, dtype=torch.int32, device=device)


for _device in ("CPU", "CUDA"):
    library.impl("check_block_mask", check_block_mask, _device)
library.impl("list_tiles", list_tiles, "CompositeExplicitAutograd")  # it may have no tensor to be dispatched by
torch.library.register_fake("cudnn_flex::list_tiles", _list_tiles_fake, lib=library)
torch.library.register_fake("cudnn_flex::check_block_mask", _check_fake, lib=library)
