"""`Problem` is one attention call as plans see it: program, direction and the geometry of every tensor.

Two problems are equal exactly when one plan serves both. Every part of engine/ works on problems; key.py makes them
from calls. This file imports no cudnn.
"""

import functools
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false

from cudnn_flex_compile.engine.launch.memory import Layout
from cudnn_flex_compile.scoremod.ir import Program
from cudnn_flex_compile.scoremod.learned import position
from cudnn_flex_compile.scoremod.text import text

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and strides in elements, and dtype."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: torch.Tensor) -> "TensorSpec":
        """The spec of a tensor, on any device."""
        return TensorSpec(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    @property
    def layout(self) -> Layout:
        """The layout as engine/launch/memory.py takes it."""
        return self.shape, self.stride, self.dtype

    def empty(self, device: torch.device) -> torch.Tensor:
        """An uninitialised tensor of this layout."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


@dataclass(frozen=True, slots=True)
class Problem:
    """One attention call, forward or backward.

    Attributes:
        program: the score and the mask (scoremod/ir.py).
        direction: FORWARD or BACKWARD.
        query: [B, Hq, Sq, Dqk]; key: [B, Hkv, Skv, Dqk]; value: [B, Hkv, Skv, Dv]; last stride 1.
        out: [B, Hq, Sq, Dv]; the gradient of the output has this layout too, unless `grad` says otherwise.
        operands: broadcastable to [B, Hq, Sq, Skv], in the order of the program.
        scale: multiplies q . k before the program.
        device: CUDA device index.
        stats: whether the forward writes the log-sum-exp (natural, [B, Hq, Sq], float32).
        grad: layout of the gradient of the output, in the backward.
        deterministic: whether torch.use_deterministic_algorithms was on.
        gradients: layouts of dq, dk and dv, if not dense_like those of query, key and value.
        lse_gradient: whether the backward takes a gradient of the log-sum-exp, too.
        tiled: for how many heads a list of tiles (engine/tiles/tile_list.py) tells which pairs are visible, beside the
            program: 1 if all share it; 0 without one.
        replay: whether the plan's launches may be replayed as CUDA graphs (engine/launch/replay.py).
    """

    program: Program
    direction: str
    query: TensorSpec
    key: TensorSpec
    value: TensorSpec
    out: TensorSpec
    operands: tuple[TensorSpec, ...]
    scale: float
    device: int
    stats: bool = True
    grad: TensorSpec | None = None
    deterministic: bool = False
    gradients: tuple[TensorSpec, ...] | None = None
    lse_gradient: bool = False
    tiled: int = 0
    replay: bool = True

    @property
    def lse_shape(self) -> tuple[int, int, int]:
        """B, Hq, Sq."""
        batch, heads, length, _ = self.query.shape
        return batch, heads, length

    @property
    def lengths(self) -> tuple[int, int]:
        """Sq, Skv."""
        return self.query.shape[2], self.key.shape[2]

    def forward(self) -> "Problem":
        """The forward problem whose outputs this backward consumes."""
        return replace(self, direction=FORWARD, grad=None, stats=True, gradients=None, lse_gradient=False)

    def backward(self, lse_gradient: bool = False) -> "Problem":
        """The backward of this forward, for a gradient laid out like the output."""
        return replace(self, direction=BACKWARD, grad=self.out, stats=True, lse_gradient=lse_gradient)


def problem_text(problem: Problem) -> str:
    """A problem without the index of its device and the way of its launch: one field a line, the program last."""
    names = [f.name for f in fields(problem) if f.name not in ("device", "program", "replay")]
    lines = [f"{name} {_text(getattr(problem, name))}" for name in names]
    return "\n".join([*lines, f"program {text(problem.program)}"])


def _text(value: object) -> str:
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))})"  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, TensorSpec):
        return f"{list(value.shape)} by {list(value.stride)} of {value.dtype}"
    return repr(value)


class Error(NamedTuple):
    """The error of one result of a plan on usual data, relative to its size (both in the 2-norm).

    Attributes:
        name: out, dQ, dK or dV.
        found: the plan's error.
        stock: the error of the same computation in stock precision.
    """

    name: str
    found: float
    stock: float


@dataclass(frozen=True, slots=True)
class Binding:
    """The tensors that a graph reads and writes at each run, which a serialised graph does not tell.

    Attributes:
        strategy: the name of its strategy.
        uids: the uids of its tensors, in the order in which a run gives their addresses: tensors by role, operands,
            constants, integers, floats.
        operands, ints, floats: the positions of those that it reads, among all operands and scalars of the program.
        hosts: the numbers of constants that are passed by value: floats as float32, integers as int32.
        filled: the numbers of constants in device memory, int32 [B, 1, 1, 1].
    """

    strategy: str
    uids: tuple[int, ...]
    operands: tuple[int, ...] = ()
    ints: tuple[int, ...] = ()
    floats: tuple[int, ...] = ()
    hosts: tuple[int | float, ...] = ()
    filled: tuple[int, ...] = ()


def stats_spec(problem: Problem) -> TensorSpec:
    """The log-sum-exp as cuDNN has it: [B, Hq, Sq, 1], float32, contiguous."""
    batch, heads, length = problem.lse_shape
    return TensorSpec((batch, heads, length, 1), (heads * length, length, 1, 1), torch.float32)


def output_specs(problem: Problem) -> tuple[TensorSpec, ...]:
    """The layouts of a plan's outputs: out and stats, or dq, dk, dv, and the gradient of a learned operand."""
    if problem.direction == FORWARD:
        return problem.out, stats_spec(problem)
    found = problem.gradients or tuple(dense_like(s) for s in (problem.query, problem.key, problem.value))
    bias = position(problem.program)
    if bias is None:
        return found
    return *found, dense(TensorSpec(problem.operands[bias].shape, (), problem.query.dtype))


def out_spec(query: TensorSpec, value: TensorSpec) -> TensorSpec:
    """The layout of the output: [B, Hq, Sq, Dv] in the query's order of strides."""
    shape = (*query.shape[:3], value.shape[3])
    return TensorSpec(shape, strides_like(shape, query.stride), query.dtype)


def dense_like(spec: TensorSpec) -> TensorSpec:
    """The layout of the gradient of such a tensor, and of its copy: in the order of its strides, without gaps."""
    return TensorSpec(spec.shape, strides_like(spec.shape, spec.stride), spec.dtype)


def usable(spec: TensorSpec) -> bool:
    """Whether cuDNN reads q, k, v or a gradient in this layout: last stride 1, 16-byte rows, nothing expanded."""
    if spec.stride[-1] != 1 and spec.shape[-1] != 1:
        return False
    outer = zip(spec.shape[:-1], spec.stride[:-1], strict=True)
    return all(size == 1 or (stride > 0 and stride % 8 == 0) for size, stride in outer)


def dense(spec: TensorSpec) -> TensorSpec:
    """The contiguous layout of the same shape."""
    strides, step = [0] * len(spec.shape), 1
    for dim in reversed(range(len(spec.shape))):
        strides[dim], step = step, step * max(spec.shape[dim], 1)
    return TensorSpec(spec.shape, tuple(strides), spec.dtype)


def strides_like(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """Dense strides for `shape` in the order of the strides `order`, the last dimension innermost.

    Fakes and kernels lay out the output and all gradients by this rule, so that they agree about every layout.
    flex_attention's own fakes and kernels follow the same one (`_permute_strides` of torch's flex_attention). Sizes and
    strides may be symbolic.
    """

    def compare(one: int, other: int) -> int:
        if guard_or_false(order[one] < order[other]):
            return -1
        return 1 if guard_or_false(order[other] < order[one]) else other - one

    last = len(order) - 1
    by_stride = sorted(range(last), key=functools.cmp_to_key(compare))
    strides: list[Any] = [0] * len(order)
    step: Any = 1
    for dim in (last, *by_stride):
        strides[dim] = step
        step *= torch.sym_max(shape[dim], 1)
    return tuple(strides)
