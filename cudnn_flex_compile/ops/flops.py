"""FLOP formulas of the ops, for torch.utils.flop_counter.

By torch's convention for attention: every (q, kv) pair counts, masked or not; a multiplication and an addition are two;
the backward computes the scores again. Knows nothing of what cuDNN skips.
"""

from typing import Any

from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from cudnn_flex_compile.ops.schemas import namespace


@register_flop_formula(namespace.attention_forward, get_raw=True)
def _forward_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


@register_flop_formula(namespace.attention_backward, get_raw=True)
def _backward_flops(
    grad_out: Tensor, grad_stats: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape)
