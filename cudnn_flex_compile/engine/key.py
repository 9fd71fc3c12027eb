"""The key of a call, which the host makes at every call, and the problem that it stands for.

Two calls with equal keys have the same problem, and the same policy by which its plan is found. A key must be cheap;
the problem is made only when a plan must be built.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.config import Policy, policy_from
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, Problem, TensorSpec, dense_like, out_spec, usable
from cudnn_flex_compile.scoremod.text import parse

Key = tuple[Any, ...]


class Call(NamedTuple):
    """Names the entries of a key: `Call(*key)`. Keys themselves are plain tuples, which are made faster.

    Attributes:
        operands: shape, stride and dtype of each.
        tiled: the number of heads for which this direction runs by a list of tiles, as in a Problem.
        policy: text (config.Policy).
        grad_stride, lse_gradient: a backward's.
    """

    direction: str
    program: str
    query_shape: tuple[int, ...]
    query_stride: tuple[int, ...]
    query_dtype: torch.dtype
    key_shape: tuple[int, ...]
    key_stride: tuple[int, ...]
    key_dtype: torch.dtype
    value_shape: tuple[int, ...]
    value_stride: tuple[int, ...]
    value_dtype: torch.dtype
    device: int
    scale: float
    stats: bool
    deterministic: bool
    operands: tuple[tuple[Any, ...], ...]
    tiled: int
    policy: str
    grad_stride: tuple[int, ...] = ()
    lse_gradient: bool = False


def forward_key(
    program: str,
    query: Any,
    key: Any,
    value: Any,
    operands: Sequence[Any],
    scale: float,
    stats: bool,
    tiled: int = 0,
    policy: str = "",
) -> Key:
    """The key of a forward call of tensors, or of anything with shape, stride(), dtype and device."""
    return (
        FORWARD, program, query.shape, query.stride(), query.dtype, key.shape, key.stride(), key.dtype,
        value.shape, value.stride(), value.dtype, query.device.index, scale, stats,
        torch_private.deterministic(),
        tuple([(o.shape, o.stride(), o.dtype) for o in operands]), tiled, policy,
    )  # fmt: skip


def backward_key(forward: Key, grad: Any, lse_gradient: bool = False) -> Key:
    """The key of a forward call's backward, for a gradient in the layout of `grad`, with one of the log-sum-exp or not.
    """
    return (BACKWARD, *forward[1:], grad.stride(), lse_gradient)


def problem_of(key: Key) -> Problem:
    """The problem of a call.

    Layouts that cuDNN cannot read are replaced by dense ones in the same order, into which the op copies. The gradients
    have the layouts of the gradients of the call's own tensors.
    """
    call = Call(*key)
    given = given_layouts(call)
    out = out_spec(given[0], given[2])
    read = tuple(readable(spec) for spec in given)
    gradients = tuple(dense_like(spec) for spec in given)
    grad = TensorSpec(out.shape, tuple(call.grad_stride), out.dtype) if call.direction == BACKWARD else None
    return Problem(
        program=parse(call.program),
        direction=call.direction,
        query=read[0],
        key=read[1],
        value=read[2],
        out=out,
        operands=tuple(TensorSpec(tuple(s), tuple(t), d) for s, t, d in call.operands),
        scale=call.scale,
        device=call.device,
        stats=call.stats,
        grad=None if grad is None else (grad if usable(grad) else out),
        deterministic=call.deterministic,
        gradients=None if grad is None or gradients == tuple(map(dense_like, read)) else gradients,
        lse_gradient=call.lse_gradient,
        tiled=call.tiled,
        replay=policy_of(key).replay,
    )


def given_layouts(call: Call) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    """Query, key and value as the call has them."""
    query = TensorSpec(tuple(call.query_shape), tuple(call.query_stride), call.query_dtype)
    key = TensorSpec(tuple(call.key_shape), tuple(call.key_stride), call.key_dtype)
    return query, key, TensorSpec(tuple(call.value_shape), tuple(call.value_stride), call.value_dtype)


def policy_of(key: Key) -> Policy:
    """The policy by which the call's plan is found. Raises ValueError for a text that is no policy's."""
    return policy_from(Call(*key).policy)


def readable(spec: TensorSpec) -> TensorSpec:
    """The layout itself, or that of the copy which cuDNN reads in its place."""
    return spec if usable(spec) else dense_like(spec)


def forward_of(key: Key) -> Key:
    """The forward call, with stats, whose outputs this backward call consumes."""
    call = Call(*key)._replace(direction=FORWARD, stats=True)
    return tuple(call[: Call._fields.index("grad_stride")])


def by_list(key: Key, tiled: int) -> Key:
    """Makes the key of the same call by a list of tiles, or without one."""
    return tuple(Call(*key)._replace(tiled=tiled))[: len(key)]


class Meta:
    """Stands in for a tensor when a key is made from layouts."""

    __slots__ = ("_stride", "device", "dtype", "shape")

    def __init__(self, spec: TensorSpec, device: torch.device) -> None:
        self.shape, self._stride, self.dtype, self.device = spec.shape, spec.stride, spec.dtype, device

    def stride(self) -> tuple[int, ...]:
        return self._stride
