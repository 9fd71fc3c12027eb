"""The key of a call, as cheap to make as can be, and the problem that it stands for.

Knows nothing of plans. Two calls with equal keys have the same problem; the key is made at every call, the
problem only when a plan must be built.
"""

from collections.abc import Sequence
from typing import Any

import torch

from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, Problem, TensorSpec, dense_like, out_spec, usable

Key = tuple[Any, ...]


def forward_key(
    program: str,
    query: Any,
    key: Any,
    value: Any,
    operands: Sequence[Any],
    scale: float,
    stats: bool,
    tiled: bool = False,
) -> Key:
    """From tensors, or anything with shape, stride(), dtype and device."""
    return (
        FORWARD, program, query.shape, query.stride(), query.dtype, key.shape, key.stride(), key.dtype,
        value.shape, value.stride(), value.dtype, query.device.index, scale, stats,
        torch.are_deterministic_algorithms_enabled(),
        tuple([(o.shape, o.stride(), o.dtype) for o in operands]), tiled,
    )  # fmt: skip


def backward_key(forward: Key, grad: Any, lse_gradient: bool = False) -> Key:
    """The backward of a forward call, for a gradient in the layout of `grad`, and one of the log-sum-exp or not."""
    return (BACKWARD, *forward[1:], grad.stride(), lse_gradient)


def problem_of(call: Key) -> Problem:
    """The problem: layouts that cuDNN cannot read are replaced by dense ones in the same order, into which the op
    copies. The gradients have the layouts that those of the call's own tensors have.
    """
    direction, program, qs, qt, qd, ks, kt, kd, vs, vt, vd, device, scale, stats, deterministic, operands, tiled = (
        call[:17]
    )
    query, key, value = (TensorSpec(tuple(s), tuple(t), d) for s, t, d in ((qs, qt, qd), (ks, kt, kd), (vs, vt, vd)))
    out, given = out_spec(query, value), (query, key, value)
    read = tuple(readable(spec) for spec in given)
    gradients = tuple(dense_like(spec) for spec in given)
    grad = TensorSpec(out.shape, tuple(call[17]), out.dtype) if direction == BACKWARD else None
    return Problem(
        program=program,
        direction=direction,
        query=read[0],
        key=read[1],
        value=read[2],
        out=out,
        operands=tuple(TensorSpec(tuple(s), tuple(t), d) for s, t, d in operands),
        scale=scale,
        device=device,
        stats=stats,
        grad=None if grad is None else (grad if usable(grad) else out),
        deterministic=deterministic,
        gradients=None if direction == FORWARD or gradients == tuple(map(dense_like, read)) else gradients,
        lse_gradient=direction == BACKWARD and call[18],
        tiled=tiled,
    )


def readable(spec: TensorSpec) -> TensorSpec:
    """The layout itself, or that of the copy which cuDNN reads in its place."""
    return spec if usable(spec) else dense_like(spec)


def forward_of(call: Key) -> Key:
    """The forward call, with stats, whose outputs this backward call consumes."""
    return (FORWARD, *call[1:13], True, *call[14:17])


class Meta:
    """Stands in for a tensor when a key is made from layouts."""

    __slots__ = ("_stride", "device", "dtype", "shape")

    def __init__(self, spec: TensorSpec, device: torch.device) -> None:
        self.shape, self._stride, self.dtype, self.device = spec.shape, spec.stride, spec.dtype, device

    def stride(self) -> tuple[int, ...]:
        return self._stride
