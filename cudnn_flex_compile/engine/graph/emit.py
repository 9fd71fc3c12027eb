"""Emits legal expressions as nodes of a cuDNN graph, one pointwise node for each op.

Strategies write their scores and masks by an `Emitter`. The dialect's rules about expressions are in
scoremod/legalize.py; those about node types and operand layouts are here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cudnn
import torch

from cudnn_flex_compile.engine.problem import BACKWARD, Problem, TensorSpec
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import BOOL, F32, I32, Expr
from cudnn_flex_compile.scoremod.optable import TABLE
from cudnn_flex_compile.scoremod.switches import on

FLOAT, INT32, BOOLEAN = cudnn.data_type.FLOAT, cudnn.data_type.INT32, cudnn.data_type.BOOLEAN
TYPES = {F32: FLOAT, I32: INT32, BOOL: BOOLEAN}
TENSOR_TYPES = {
    torch.bfloat16: cudnn.data_type.BFLOAT16,
    torch.float16: cudnn.data_type.HALF,
    torch.float32: cudnn.data_type.FLOAT,
    torch.int32: cudnn.data_type.INT32,
}
AXIS_NUMBER = {axis: i for i, axis in enumerate(ir.AXES)}
LOGICAL = ("and", "or", "not")


def typed(tensor: Any, dtype: Any) -> Any:
    tensor.set_data_type(dtype)
    return tensor


@dataclass(slots=True)
class Inputs:
    """The graph tensors that expressions read: operands by position, scalars and constants by value.

    `expanded` is the lowering's. `filled` has int32 [B, 1, 1, 1] device tensors of one number, and `hosts` a host
    buffer for each pass-by-value tensor. `operands`, `ints` and `floats` have the tensors that get their value at each
    call.
    """

    graph: Any
    problem: Problem
    operands: dict[int, Any] = field(default_factory=dict[int, Any])
    ints: dict[int, Any] = field(default_factory=dict[int, Any])
    floats: dict[int, Any] = field(default_factory=dict[int, Any])
    hosts: list[tuple[Any, torch.Tensor]] = field(default_factory=list[tuple[Any, torch.Tensor]])
    constants: dict[Expr, Any] = field(default_factory=dict[Expr, Any])
    expanded: bool = False
    filled: list[tuple[Any, int]] = field(default_factory=list[tuple[Any, int]])

    def length(self, number: int | None = None, operand: int | None = None) -> Any:
        """An int32 [B, 1, 1, 1] tensor of lengths: one number, or an operand as it is."""
        batch = self.problem.query.shape[0]
        tensor = self.graph.tensor(dim=[batch, 1, 1, 1], stride=[1] * 4, data_type=INT32)
        if operand is not None:
            self.operands[operand] = tensor
        else:
            self.filled.append((tensor, number or 0))
        return tensor

    def declare(self, *roots: Expr) -> None:
        """Makes the tensors of all leaves; they must exist before the callbacks run."""
        for node in ir.walk(*roots):
            match node.kind:
                case "operand" if node.value not in self.operands:
                    self.operands[int(node.value or 0)] = self._operand(node)
                case "scalar":
                    bank = self.floats if node.dtype == F32 else self.ints
                    bank.setdefault(int(node.value or 0), self._by_value(TYPES[node.dtype]))
                case "const" if node.dtype != BOOL:
                    self.constant(node)
                case _:
                    pass

    def constant(self, node: Expr) -> Any:
        if node not in self.constants:
            self.constants[node] = tensor = self._by_value(TYPES[node.dtype])
            dtype = torch.float32 if node.dtype == F32 else torch.int32
            self.hosts.append((tensor, torch.full((1, 1, 1, 1), node.value, dtype=dtype)))  # pyright: ignore
        return self.constants[node]

    def _by_value(self, dtype: Any) -> Any:
        return self.graph.tensor(dim=[1] * 4, stride=[1] * 4, is_pass_by_value=True, data_type=dtype)

    def _operand(self, node: Expr) -> Any:
        spec = operand_view(node, self.problem, self.expanded)
        return self.graph.tensor(dim=spec.shape, stride=spec.stride, data_type=TENSOR_TYPES[spec.dtype])


def operand_view(node: Expr, problem: Problem, expanded: bool = False) -> TensorSpec:
    """The dims and strides under which cuDNN reads an operand right.

    With `expanded`, all operands have every batch entry and head: some graphs with operands of different dims were
    computed wrongly on 9.19. A stride-0 expansion costs no memory. Along kv alone it is needed in the backward; for
    [B, H, 1, 1], and for integers without a query axis, in both directions.
    """
    spec = problem.operands[int(node.value or 0)]
    full = (*problem.query.shape[:3], problem.key.shape[2])
    widen: set[int] = {d for d in (0, 1) if spec.shape[d] == 1} if expanded else set()
    single = "q" not in node.dims and "k" not in node.dims
    if "k" in node.dims and "q" not in node.dims and problem.direction == BACKWARD and on("columns expanded"):
        widen.add(2)
    if single and node.dims == "bh" and on("heads expanded"):
        widen.add(2)
    if single and node.dtype == I32 and on("integers expanded"):
        widen.add(2)
    shape = tuple(full[d] if d in widen else n for d, n in enumerate(spec.shape))
    stride = tuple(0 if d in widen else s for d, s in enumerate(spec.stride))
    return TensorSpec(shape, stride, spec.dtype)


class Emitter:
    """Writes expressions into the graph that a score_mod callback receives.

    Args:
        graph: that graph.
        inputs: the declared inputs.
        score: the tensor that SCORE stands for; indices are generated from it.
        grad: the tensor that GRAD stands for, in a backward callback.
    """

    def __init__(self, graph: Any, inputs: Inputs, score: Any, grad: Any = None) -> None:
        self.graph, self.inputs, self.score, self.grad = graph, inputs, score, grad
        self.done: dict[tuple[Expr, Any], Any] = {}

    def emit(self, root: Expr, dtype: Any = None) -> Any:
        """The tensor of `root`. A predicate is BOOLEAN, or INT32 if `dtype` says so."""
        wanted = dtype or TYPES[root.dtype]
        key = (root, wanted)
        if key not in self.done:
            self.done[key] = self._node(root, wanted) if root.args else self._leaf(root)
        return self.done[key]

    def index(self, axis: str, like: Any = None) -> Any:
        """A fresh gen_index node; `like` is the tensor to take it from, the score if not given."""
        source = self.score if like is None else like
        return typed(self.graph.gen_index(input=source, axis=AXIS_NUMBER[axis], compute_data_type=INT32), INT32)

    def _leaf(self, node: Expr) -> Any:
        match node.kind:
            case "score":
                return self.score
            case "grad":
                return self.grad
            case "index":
                return self.index(str(node.value))
            case "operand":
                return self.inputs.operands[int(node.value or 0)]
            case "scalar":
                return (self.inputs.floats if node.dtype == F32 else self.inputs.ints)[int(node.value or 0)]
            case _:
                return self.inputs.constants[node]

    def _node(self, node: Expr, dtype: Any) -> Any:
        if node.kind in (F32, I32):  # integers enter float ops as they are
            return self.emit(node.args[0])
        if node.kind in LOGICAL:  # logical ops of BOOLEAN tensors are refused
            return self.node(node.kind, BOOL, *(self.emit(a, INT32) for a in node.args), typed_as=INT32)
        return self.node(node.kind, node.dtype, *(self.emit(a) for a in node.args), typed_as=dtype)

    def node(self, kind: str, dtype: str, *tensors: Any, typed_as: Any = None) -> Any:
        """One pointwise node: the op table's `kind` on tensors, computed in `dtype`."""
        row = TABLE[kind]
        method: Callable[..., Any] = getattr(self.graph, str(row.cudnn))
        result = method(**dict(zip(row.slots, tensors, strict=True)), compute_data_type=TYPES[dtype])
        return typed(result, typed_as or TYPES[dtype])
