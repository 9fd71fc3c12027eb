"""Reads what score_mod and mask_mod captured: tensors, and Python numbers that Dynamo turned symbolic.

Each captured input becomes one leaf of the expressions that programs.py traces.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from cudnn_flex_compile.passes.read.call import Call, ancestors, example
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.aten_table import HALVES, Untraceable, dtype_of
from cudnn_flex_compile.scoremod.ir import F32, I32, Expr
from cudnn_flex_compile.scoremod.trace import Captured


@dataclass(slots=True)
class Captures:
    """The captured inputs of a call; one that is captured several times is there once.

    Attributes:
        nodes: the node, or number, of each leaf.
        of_score, of_mask: the captured arguments of the two subgraphs, in order.
        ints, floats: the scalar leaves, in the order of their positions.
        learned: the leaves of tensors that require grad, where gradients are on.
    """

    nodes: dict[Expr, Any] = field(default_factory=dict[Expr, Any])
    of_score: list[Captured] = field(default_factory=list[Captured])
    of_mask: list[Captured] = field(default_factory=list[Captured])
    ints: list[Expr] = field(default_factory=list[Expr])
    floats: list[Expr] = field(default_factory=list[Expr])
    learned: set[Expr] = field(default_factory=set[Expr])

    @property
    def stored(self) -> dict[Expr, torch.dtype]:
        """The dtypes of captured tensors of 16-bit floats."""
        values = {leaf: example(value) for leaf, value in self.nodes.items() if leaf.kind == "capture"}
        return {leaf: tensor.dtype for leaf, tensor in values.items() if tensor.dtype in HALVES}

    def leaf_of(self, value: Any, only_item: bool) -> Expr:
        for leaf, known in self.nodes.items():
            if known is value and (leaf.kind == "scalar") == (only_item or not _is_tensor(value)):
                return leaf
        leaf = self._new_leaf(value, only_item)
        self.nodes[leaf] = value
        return leaf

    def _new_leaf(self, value: Any, only_item: bool) -> Expr:
        if not _is_tensor(value):
            self.ints.append(ir.scalar(len(self.ints), I32))
            return self.ints[-1]
        if only_item:
            self.floats.append(ir.scalar(len(self.floats), F32))
            return self.floats[-1]
        return ir.capture(len(self.nodes), dtype_of(example(value).dtype, "a captured tensor"))


def _is_tensor(value: Any) -> bool:
    return isinstance(example(value), torch.Tensor)


def read_captures(call: Call) -> Captures | Reason:
    """All captured inputs of a call, or the reason why they cannot be lowered."""
    captures = Captures()
    device = example(call.query).device
    for module, values, arguments, leading in (
        (call.score_mod, call.score_captured, captures.of_score, 5),
        (call.mask_mod, call.mask_captured, captures.of_mask, 4),
    ):
        for position, value in enumerate(values):
            tensor = example(value)
            if not isinstance(tensor, torch.Tensor):
                arguments.append(Captured(None, captures.leaf_of(value, only_item=False)))
                continue
            only_item = _only_item(module, leading + position) and tensor.device.type == "cpu"
            if tensor.device != device and not only_item:
                return Reason(Code.DEVICE, f"a captured tensor is on {tensor.device}, the query on {device}")
            learned = tensor.requires_grad and call.mode.grad
            if learned and only_item:
                return Reason(Code.CAPTURED_GRADIENT, "a captured tensor that requires grad is read by item()")
            try:
                arguments.append(Captured(tensor, captures.leaf_of(value, only_item), learned))
            except Untraceable as error:
                return Reason(Code.UNKNOWN_OP, str(error))
            captures.learned.update([arguments[-1].leaf] if learned else [])
    return captures


def _only_item(module: GraphModule, position: int) -> bool:
    """Whether a 0-d captured tensor stands for a Python float: the function only takes its `.item()`."""
    placeholders: list[Node] = [n for n in module.graph.nodes if n.op == "placeholder"]
    users = placeholders[position].users
    return bool(users) and all(u.op == "call_method" and u.target == "item" for u in users)


def indexing(call: Call) -> set[Any]:
    """The captured nodes by which the user's functions index another captured tensor.

    Made-up values of these nodes could be out of range. Any argument beside a captured tensor counts as an index,
    because an op of a mod takes a whole captured tensor only to read from it.
    """
    found: set[Any] = set()
    for module, values, leading in ((call.score_mod, call.score_captured, 5), (call.mask_mod, call.mask_captured, 4)):
        placeholders: list[Node] = [n for n in module.graph.nodes if n.op == "placeholder"]
        captured = dict(zip(placeholders[leading:], values, strict=False))
        for node in module.graph.nodes:
            inputs = node.all_input_nodes
            if inputs and inputs[0] in captured and _dims(captured[inputs[0]]):
                found |= {captured[n] for n in ancestors(inputs[1:]) if n in captured and isinstance(captured[n], Node)}
    return found


def _dims(value: Any) -> int:
    tensor = example(value)
    return tensor.dim() if isinstance(tensor, torch.Tensor) else 0
