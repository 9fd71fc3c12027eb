"""The custom ops and their fakes: `cudnn_flex::attention`, made of `attention_forward` and `attention_backward`.

Knows nothing of FX passes. Imports the kernels of a device when they first run.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cudnn_flex_compile.engine.problem import strides_like

LOG2E = 1 / math.log(2)

SCHEMAS = {
    "attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor[] operands, SymInt[] ints, Tensor[] floats, str program,"
        " float scale, bool return_lse, bool stats, Tensor? guard) -> (Tensor out, Tensor lse, Tensor stats)"
    ),
    "attention_forward": (
        "(Tensor query, Tensor key, Tensor value, Tensor[] operands, SymInt[] ints, Tensor[] floats, str program,"
        " float scale, bool stats, Tensor? guard) -> (Tensor out, Tensor stats)"
    ),
    "attention_backward": (
        "(Tensor grad_out, Tensor? grad_stats, Tensor query, Tensor key, Tensor value, Tensor out, Tensor stats,"
        " Tensor[] operands, SymInt[] ints, Tensor[] floats, str program, float scale)"
        " -> (Tensor dq, Tensor dk, Tensor dv)"
    ),
    "permute_keys": "(Tensor keys, Tensor order, Tensor slots) -> Tensor",
    "check_block_mask": (
        "(Tensor[] blocks, Tensor[] operands, SymInt[] ints, Tensor[] floats, str program, SymInt[] sizes,"
        " SymInt[] block_sizes) -> Tensor"
    ),
}

library = torch.library.Library("cudnn_flex", "DEF")
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


Gradients = tuple[Tensor, Tensor, Tensor]


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises ValueError for tensors that are no attention call."""
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


def _new_stats(query: Tensor, wanted: bool) -> Tensor:
    return query.new_empty(query.shape[:3] if wanted else (0,), dtype=torch.float32)


@torch.library.impl(library, "attention_forward", "CUDA")
def _forward_cuda(
    query: Tensor, key: Tensor, value: Tensor, operands: list[Tensor], ints: list[int], floats: list[Tensor],
    program: str, scale: float, stats: bool, guard: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _cuda().forward(query, key, value, operands, ints, floats, program, scale, stats)


@functools.cache
def _cuda() -> Any:
    from cudnn_flex_compile.kernels import cuda

    return cuda


@torch.library.impl(library, "attention_forward", "CPU")
def _forward_cpu(
    query: Tensor, key: Tensor, value: Tensor, operands: list[Tensor], ints: list[int], floats: list[Tensor],
    program: str, scale: float, stats: bool, guard: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from cudnn_flex_compile.kernels import cpu

    _check(query, key, value)
    out, natural = _new_out(query, value), _new_stats(query, True)
    cpu.forward(query, key, value, operands, ints, floats, program, scale, out, natural)
    return out, natural if stats else _new_stats(query, False)


def _forward_fake(
    query: Tensor, key: Tensor, value: Tensor, operands: list[Tensor], ints: list[int], floats: list[Tensor],
    program: str, scale: float, stats: bool, guard: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(query, key, value)
    return _new_out(query, value), _new_stats(query, stats)


@torch.library.impl(library, "attention_backward", "CUDA")
def _backward_cuda(
    grad_out: Tensor, grad_stats: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor,
    operands: list[Tensor], ints: list[int], floats: list[Tensor], program: str, scale: float,
) -> Gradients:  # fmt: skip
    return _cuda().backward(grad_out, grad_stats, query, key, value, out, stats, operands, ints, floats, program, scale)


@torch.library.impl(library, "attention_backward", "CPU")
def _backward_cpu(
    grad_out: Tensor, grad_stats: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor,
    operands: list[Tensor], ints: list[int], floats: list[Tensor], program: str, scale: float,
) -> Gradients:  # fmt: skip
    from cudnn_flex_compile.kernels import cpu

    rest = (operands, ints, floats, program, scale)
    gradients = cpu.backward(grad_out, grad_stats, query, key, value, out, stats, *rest)
    dq, dk, dv = (torch.empty_like(t).copy_(g) for t, g in zip((query, key, value), gradients, strict=True))
    return dq, dk, dv


def _backward_fake(
    grad_out: Tensor, grad_stats: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor,
    operands: list[Tensor], ints: list[int], floats: list[Tensor], program: str, scale: float,
) -> Gradients:  # fmt: skip
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _Attention(torch.autograd.Function):
    """Attention that records a gradient, made of the two ops that compute."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, operands: list[Tensor], ints: list[int],
        floats: list[Tensor], program: str, scale: float, return_lse: bool, guard: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, stats = attention_forward(query, key, value, operands, ints, floats, program, scale, True, guard)
        ctx.set_materialize_grads(False)
        if not return_lse:
            ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(query, key, value, out, stats, *operands, *floats)
        ctx.operands, ctx.ints, ctx.program, ctx.scale = len(operands), ints, program, scale
        return out, stats

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_out: Tensor | None, grad_stats: Tensor | None
    ) -> Any:
        query, key, value, out, stats, *rest = ctx.saved_tensors
        if grad_out is None and grad_stats is None:
            return (None,) * 10
        gradients = attention_backward(
            torch.zeros_like(out) if grad_out is None else grad_out,
            *(grad_stats, query, key, value, out, stats, rest[: ctx.operands], ctx.ints, rest[ctx.operands :]),
            *(ctx.program, ctx.scale),
        )
        return (*gradients, *(None,) * 7)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: list[Tensor],
    ints: list[int],
    floats: list[Tensor],
    program: str,
    scale: float,
    return_lse: bool,
    stats: bool,
    guard: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What compilers decompose: below it there is no autograd, whose bookkeeping a compiled graph need not pay."""
    arguments = (query, key, value, operands, ints, floats, program, scale)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        out, natural = _Attention.apply(*arguments, return_lse, guard)  # pyright: ignore
    else:
        out, natural = attention_forward(*arguments, stats or return_lse, guard)
    lse = natural * LOG2E if return_lse else _new_stats(query, False)
    return out, lse, natural.detach() if stats else _new_stats(query, False)


library.impl("attention", _attention, "CompositeImplicitAutograd")
for _name in ("attention_forward", "attention_backward"):
    library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


class _PermuteKeys(torch.autograd.Function):
    """A gather whose gradient is the gather by the inverse, where autograd would add up atomically."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, order: Tensor, slots: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(order, slots)
        return _gathered(keys, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        order, slots = ctx.saved_tensors
        return _PermuteKeys.apply(grad, slots, order), None, None


def _gathered(keys: Tensor, order: Tensor) -> Tensor:
    return torch.gather(keys, 2, order[:, None, :, None].expand(keys.shape))


def _permute_keys(keys: Tensor, order: Tensor, slots: Tensor) -> Tensor:
    """keys[b, h, order[b, i], d], for `slots` the inverse of the permutation `order` [B or 1, Skv]."""
    return _PermuteKeys.apply(keys, order, slots)  # pyright: ignore


library.impl("permute_keys", _permute_keys, "CompositeImplicitAutograd")


def _check_block_mask(
    blocks: list[Tensor], operands: list[Tensor], ints: list[int], floats: list[Tensor], program: str,
    sizes: list[int], block_sizes: list[int],
) -> Tensor:  # fmt: skip
    """An empty tensor, for attention to depend on. Raises RuntimeError where blocks and program disagree."""
    from cudnn_flex_compile.kernels import block_mask

    block_mask.check(blocks, operands, ints, floats, program, sizes, block_sizes)
    return blocks[0].new_empty(0, dtype=torch.int32)


for _device in ("CPU", "CUDA"):
    library.impl("check_block_mask", _check_block_mask, _device)


def _check_fake(
    blocks: list[Tensor], operands: list[Tensor], ints: list[int], floats: list[Tensor], program: str,
    sizes: list[int], block_sizes: list[int],
) -> Tensor:  # fmt: skip
    return blocks[0].new_empty(0, dtype=torch.int32)


for _name, _fake in {
    "attention_forward": _forward_fake,
    "attention_backward": _backward_fake,
    "check_block_mask": _check_fake,
}.items():
    torch.library.register_fake(f"cudnn_flex::{_name}", _fake, lib=library)

attention = torch.ops.cudnn_flex.attention.default
attention_forward = torch.ops.cudnn_flex.attention_forward.default
attention_backward = torch.ops.cudnn_flex.attention_backward.default
permute_keys = torch.ops.cudnn_flex.permute_keys.default
check_block_mask = torch.ops.cudnn_flex.check_block_mask.default
