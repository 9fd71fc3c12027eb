"""`attention_forward`, `attention_backward`, `check_block_mask` and `list_tiles` as plain functions: the ops without
torch's dispatcher.

Compiled graphs call these in place of the ops, because the dispatcher takes as long as everything else that the host
does for a call. A function calls the op all the same wherever something may depend on the dispatcher: on other devices,
for tensors of another type, under a dispatch mode (fake tensors, tracing, counting of FLOPs), and under a profiler.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.kernels import bound_calls
from cudnn_flex_compile.ops.masks import check_block_mask as check_plain
from cudnn_flex_compile.ops.masks import list_tiles as list_plain
from cudnn_flex_compile.ops.schemas import (
    Gradients,
    attention_backward,
    attention_forward,
    check_block_mask,
    list_tiles,
    namespace,
)  # fmt: skip

PLAIN = (Tensor, Parameter)
# The names of the functions in torch.ops.cudnn_flex.
FORWARD, BACKWARD, CHECK = "undispatched_forward", "undispatched_backward", "undispatched_check"
LIST = "undispatched_list"
_forwards, _backwards, _run = bound_calls.forwards, bound_calls.backwards, bound_calls.run


def _dispatched(tensor: Tensor) -> bool:
    """Whether the dispatcher has to see a call on this tensor."""
    return not tensor.is_cuda or type(tensor) not in PLAIN or _watched()


def _watched() -> bool:
    """Whether the dispatcher has to see any call."""
    return torch.compiler.is_compiling() or torch_private.dispatch_modes() > 0 or torch_private.profiling()


@functools.cache
def _cuda() -> Any:
    from cudnn_flex_compile.kernels import cuda

    return cuda


def forward(
    query: Tensor, key: Tensor, value: Tensor, operands: list[Tensor], ints: list[int], floats: list[Tensor],
    program: str, scale: float, stats: bool, stock: list[Tensor], layout: list[int], by_blocks: str,
    tiles: Tensor | None = None, policy: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs the op `attention_forward`."""
    outputs, bound = None, _forwards.get(program)
    if bound is not None:
        outputs = _run(bound, (query, key, value), operands, scale, stats, policy, tiles, stock)
        if outputs:
            return outputs
    if _dispatched(query):
        kept = (stock, layout, by_blocks, tiles, policy)
        return attention_forward(query, key, value, operands, ints, floats, program, scale, stats, *kept)
    given = (stock, layout, by_blocks) if stock else None
    rest = (program, scale, stats, tiles, policy, given, outputs is None)
    return _cuda().forward(query, key, value, operands, ints, floats, *rest)


def backward(
    grad_out: Tensor, grad_stats: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor,
    operands: list[Tensor], ints: list[int], floats: list[Tensor], program: str, scale: float, stock: list[Tensor],
    layout: list[int], by_blocks: str, tiles: Tensor | None = None, policy: str = "",
) -> Gradients:  # fmt: skip
    """Runs the op `attention_backward`."""
    outputs, bound = None, _backwards.get(program)
    if bound is not None:
        of_lse = grad_stats is not None
        tensors = (query, key, value, out, stats, grad_out)
        tensors = (*tensors, grad_stats) if of_lse else tensors
        outputs = _run(bound, tensors, operands, scale, of_lse, policy, tiles, stock)
        if outputs:
            return outputs
    plain = type(grad_out) in PLAIN and (grad_stats is None or type(grad_stats) in PLAIN)
    given = (grad_out, grad_stats, query, key, value, out, stats, operands, ints, floats, program, scale)
    if not plain or _dispatched(query):
        return attention_backward(*given, stock, layout, by_blocks, tiles, policy)
    return _cuda().backward(*given, tiles, policy, (stock, layout, by_blocks) if stock else None, outputs is None)


def check(blocks: list[Tensor], *rest: Any) -> Tensor:
    """Runs the op `check_block_mask`."""
    return (check_block_mask if _dispatched(blocks[0]) else check_plain)(blocks, *rest)


def list_without_dispatch(blocks: list[Tensor], captured: list[Tensor], *rest: Any) -> Tensor:
    """Runs the op `list_tiles`."""
    given = next(iter((*blocks, *captured)), None)
    seen = _watched() if given is None else _dispatched(given)
    return (list_tiles if seen else list_plain)(blocks, captured, *rest)


# Inductor's generated code finds the functions here, also code from its caches.
setattr(namespace, FORWARD, forward)
setattr(namespace, BACKWARD, backward)
setattr(namespace, CHECK, check)
setattr(namespace, LIST, list_without_dispatch)
