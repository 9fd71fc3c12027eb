"""The custom ops: `cudnn_flex::attention`, made of `attention_forward` and `attention_backward`, and three helpers.

Importing this registers them.
"""

from cudnn_flex_compile.ops import autograd, flops, implementations, masks  # noqa: F401  # pyright: ignore
from cudnn_flex_compile.ops.schemas import (
    attention,
    attention_backward,
    attention_forward,
    check_block_mask,
    list_tiles,
    permute_keys,
)

__all__ = ["attention", "attention_backward", "attention_forward", "check_block_mask", "list_tiles", "permute_keys"]
