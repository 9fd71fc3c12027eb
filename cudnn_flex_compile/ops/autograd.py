"""`cudnn_flex::attention`: the forward and the backward as one differentiable function.

implementations.py runs both on each device; this file connects them for autograd.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from cudnn_flex_compile.ops.implementations import new_stats
from cudnn_flex_compile.ops.schemas import attention_backward, attention_forward, library
from cudnn_flex_compile.ops.undispatched import backward, forward
from cudnn_flex_compile.scoremod.learned import position_in

LOG2E = 1 / math.log(2)
# The error that a stock compiled flex_attention raises for a second derivative.
TWICE = "torch.compile with aot_autograd does not currently support double backward"


class Attention(torch.autograd.Function):
    """Attention that records a gradient: the output and the natural log-sum-exp."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, operands: list[Tensor],
        ints: list[int], floats: list[Tensor], program: str, scale: float, return_lse: bool, stock: list[Tensor],
        layout: list[int], by_blocks: str, tiles: Tensor | None, backward_tiles: Tensor | None, policy: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`bias` is the learned operand: autograd sees no tensors in lists."""
        rest = (program, scale, True, stock, layout, by_blocks, tiles, policy)
        run = attention_forward if torch.compiler.is_compiling() else forward  # which Dynamo can't trace
        out, stats = run(query, key, value, operands, ints, floats, *rest)
        ctx.set_materialize_grads(False)
        if not return_lse:
            ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(query, key, value, out, stats, backward_tiles, *operands, *floats, *stock)
        ctx.floats, ctx.layout, ctx.by_blocks = len(operands) + len(floats), layout, by_blocks
        ctx.operands, ctx.ints, ctx.program, ctx.scale, ctx.policy = len(operands), ints, program, scale, policy
        ctx.learned = bias is not None
        return out, stats

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_out: Tensor | None, grad_stats: Tensor | None
    ) -> Any:
        query, key, value, out, stats, tiles, *rest = ctx.saved_tensors
        if grad_out is None and grad_stats is None:
            return (None,) * 16
        run = attention_backward if torch.compiler.is_compiling() else backward
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            gradients = run(
                torch.zeros_like(out) if grad_out is None else grad_out,
                *(grad_stats, query, key, value, out, stats, rest[: ctx.operands], ctx.ints),
                *(rest[ctx.operands : ctx.floats], ctx.program, ctx.scale),
                *(rest[ctx.floats :], ctx.layout, ctx.by_blocks, tiles, ctx.policy),
            )
        *main, dbias = _once(gradients)
        return (*main, dbias if ctx.learned else None, *(None,) * 12)


class _Once(torch.autograd.Function):
    """Hands tensors on, and raises an error in place of their gradient."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(TWICE)


def _once(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients, which raise an error when they are differentiated.

    Those of `once_differentiable` raise it only where the output's gradient requires a gradient itself. Elsewhere a
    gradient penalty would be differentiated without an error, and would lack its terms in queries and keys.
    """
    if not torch.is_grad_enabled():  # then autograd records nothing
        return gradients
    return _Once.apply(*(gradient.detach().requires_grad_() for gradient in gradients))  # pyright: ignore


def attention(
    query: Tensor, key: Tensor, value: Tensor, operands: list[Tensor], ints: list[int], floats: list[Tensor],
    program: str, scale: float, return_lse: bool, stats: bool, stock: list[Tensor], layout: list[int], by_blocks: str,
    tiles: Tensor | None = None, backward_tiles: Tensor | None = None, policy: str = "",
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """The op without dispatch: out, the log-sum-exp in base 2, and the natural one (with a gradient)."""
    position = position_in(program) if operands else None
    bias = None if position is None else operands[position]
    learned = bias is not None and bias.requires_grad
    rest, blocks = (operands, ints, floats, program, scale), (stock, layout, by_blocks)
    by = tiles, backward_tiles, policy
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad or learned):
        out, natural = Attention.apply(query, key, value, bias, *rest, return_lse, *blocks, *by)  # pyright: ignore
    else:
        out, natural = forward(query, key, value, *rest, stats or return_lse, *blocks, tiles, policy)
    return out, natural * LOG2E if return_lse else None, natural


def _attention(
    query: Tensor, key: Tensor, value: Tensor, operands: list[Tensor], ints: list[int], floats: list[Tensor],
    program: str, scale: float, return_lse: bool, stats: bool, stock: list[Tensor], layout: list[int], by_blocks: str,
    tiles: Tensor | None = None, backward_tiles: Tensor | None = None, policy: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op as compilers decompose it, below autograd, whose bookkeeping a compiled graph need not pay for."""
    arguments = (query, key, value, operands, ints, floats, program, scale, return_lse, stats)
    out, lse, natural = attention(*arguments, stock, layout, by_blocks, tiles, backward_tiles, policy)
    lse = new_stats(query, False) if lse is None else lse
    return out, lse, natural.detach() if stats else new_stats(query, False)


library.impl("attention", _attention, "CompositeImplicitAutograd")
for _name in ("attention_forward", "attention_backward"):
    library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
