"""Implements `attention_forward` and `attention_backward` on each device, and their fakes.

It imports the kernels of a device when they first run. autograd.py makes one differentiable op of both.
"""

from typing import Any

import torch
from torch import Tensor

from cudnn_flex_compile.engine.problem import strides_like
from cudnn_flex_compile.kernels.arguments import Arguments
from cudnn_flex_compile.ops.profiling import named
from cudnn_flex_compile.ops.schemas import Gradients, library
from cudnn_flex_compile.scoremod.learned import position_in


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises ValueError for tensors that do not fit together as an attention call."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 4:
        raise ValueError(f"cudnn_flex::attention takes [B, H, S, D] tensors, got {shapes}")
    same = query.shape[0] == key.shape[0] == value.shape[0] and query.shape[3] == key.shape[3]
    if not same or key.shape[1:3] != value.shape[1:3] or query.shape[1] % key.shape[1]:
        raise ValueError(
            "cudnn_flex::attention takes equal batches, equal query and key head dims, equal key and value heads"
            f" and lengths, and query heads a multiple of key heads; got {shapes}"
        )


def _new_out(query: Tensor, value: Tensor) -> Tensor:
    shape = (*query.shape[:3], value.shape[3])
    return query.new_empty_strided(shape, strides_like(shape, query.stride()))


def _new_gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (t.new_empty_strided(t.shape, strides_like(t.shape, t.stride())) for t in (query, key, value))
    return dq, dk, dv


def new_stats(query: Tensor, wanted: bool) -> Tensor:
    """Uninitialised natural log-sum-exps [B, H, Sq], float32; empty if not wanted."""
    return query.new_empty(query.shape[:3] if wanted else (0,), dtype=torch.float32)


def _new_bias(query: Tensor, operands: list[Tensor], program: str) -> Tensor:
    position = position_in(program)
    return query.new_empty((0,) if position is None else operands[position].shape)


def _disagreeing(
    query: Tensor, key: Tensor, ints: list[int], floats: list[Tensor], stock: list[Tensor], layout: list[int],
    by_blocks: str, tiles: Tensor | None,
) -> Any:  # fmt: skip
    """The call as stock flex_attention runs it, if it has a BlockMask that disagrees with its mask, or may disagree."""
    from cudnn_flex_compile.kernels import block_mask_contract
    from cudnn_flex_compile.kernels.stock import Stock

    given = (stock, layout, by_blocks)
    if not stock or (tiles is None and block_mask_contract.agrees(given, query, key, ints, floats)):
        return None
    return Stock.of(*given)


@torch.library.impl(library, "attention_forward", "CUDA")
def _forward_cuda(
    query: Tensor, key: Tensor, value: Tensor, operands: list[Tensor], ints: list[int], floats: list[Tensor],
    program: str, scale: float, stats: bool, stock: list[Tensor], layout: list[int], by_blocks: str,
    tiles: Tensor | None = None, policy: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from cudnn_flex_compile.kernels import cuda

    with named("forward", program):
        given = (stock, layout, by_blocks) if stock else None
        return cuda.forward(query, key, value, operands, ints, floats, program, scale, stats, tiles, policy, given)


@torch.library.impl(library, "attention_forward", "CPU")
def _forward_cpu(
    query: Tensor, key: Tensor, value: Tensor, operands: list[Tensor], ints: list[int], floats: list[Tensor],
    program: str, scale: float, stats: bool, stock: list[Tensor], layout: list[int], by_blocks: str,
    tiles: Tensor | None = None, policy: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from cudnn_flex_compile.kernels import cpu

    _check(query, key, value)
    out, natural = _new_out(query, value), new_stats(query, True)
    kept = _disagreeing(query, key, ints, floats, stock, layout, by_blocks, tiles)
    with named("forward", program), torch.autocast("cpu", enabled=False):
        cpu.forward(query, key, value, Arguments(operands, ints, floats, program, scale), out, natural, kept)
    return out, natural if stats else new_stats(query, False)


def _forward_fake(
    query: Tensor, key: Tensor, value: Tensor, operands: list[Tensor], ints: list[int], floats: list[Tensor],
    program: str, scale: float, stats: bool, stock: list[Tensor], layout: list[int], by_blocks: str,
    tiles: Tensor | None = None, policy: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(query, key, value)
    return _new_out(query, value), new_stats(query, stats)


@torch.library.impl(library, "attention_backward", "CUDA")
def _backward_cuda(
    grad_out: Tensor, grad_stats: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor,
    operands: list[Tensor], ints: list[int], floats: list[Tensor], program: str, scale: float, stock: list[Tensor],
    layout: list[int], by_blocks: str, tiles: Tensor | None = None, policy: str = "",
) -> Gradients:  # fmt: skip
    from cudnn_flex_compile.kernels import cuda

    rest = (operands, ints, floats, program, scale, tiles, policy, (stock, layout, by_blocks) if stock else None)
    with named("backward", program):
        return cuda.backward(grad_out, grad_stats, query, key, value, out, stats, *rest)


@torch.library.impl(library, "attention_backward", "CPU")
def _backward_cpu(
    grad_out: Tensor, grad_stats: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor,
    operands: list[Tensor], ints: list[int], floats: list[Tensor], program: str, scale: float, stock: list[Tensor],
    layout: list[int], by_blocks: str, tiles: Tensor | None = None, policy: str = "",
) -> Gradients:  # fmt: skip
    from cudnn_flex_compile.kernels import cpu

    given = Arguments(operands, ints, floats, program, scale)
    kept = _disagreeing(query, key, ints, floats, stock, layout, by_blocks, tiles)
    with named("backward", program), torch.autocast("cpu", enabled=False):
        gradients = cpu.backward(grad_out, grad_stats, query, key, value, out, stats, given, kept)
    into = (*_new_gradients(query, key, value), _new_bias(query, operands, program))
    for tensor, gradient in zip(into, gradients, strict=False):
        tensor.copy_(gradient)
    return into


def _backward_fake(
    grad_out: Tensor, grad_stats: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor,
    operands: list[Tensor], ints: list[int], floats: list[Tensor], program: str, scale: float, stock: list[Tensor],
    layout: list[int], by_blocks: str, tiles: Tensor | None = None, policy: str = "",
) -> Gradients:  # fmt: skip
    return *_new_gradients(query, key, value), _new_bias(query, operands, program)


for _name, _fake in {"attention_forward": _forward_fake, "attention_backward": _backward_fake}.items():
    torch.library.register_fake(f"cudnn_flex::{_name}", _fake, lib=library)
