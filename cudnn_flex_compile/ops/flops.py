"""FLOP formulas of the ops, for torch.utils.flop_counter.

They follow torch's convention for attention: every (q, kv) pair counts, masked or not; a multiplication and an addition
are two; the backward computes the scores again. Tiles that a kernel skips count, too.
"""

from typing import Any

from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from cudnn_flex_compile.ops.schemas import namespace


@register_flop_formula(namespace.attention_forward, get_raw=True)
def _forward_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return _per_dim(query, key) * (query.shape[3] + value.shape[3])  # scores, out


@register_flop_formula(namespace.attention_backward, get_raw=True)
def _backward_flops(
    grad_out: Tensor, grad_stats: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    return _per_dim(query, key) * (3 * query.shape[3] + 2 * value.shape[3])  # scores, dQ, dK; dP, dV


def _per_dim(query: Tensor, key: Tensor) -> int:
    """The FLOPs of a product over all pairs, for each channel."""
    batch, heads, rows, _ = query.shape
    return 2 * batch * heads * rows * key.shape[2]
