"""Says which arguments of a node are written into, by the schema of the node's target.

effects.py asks it. Functions and methods that are bindings of one op count as that op.
"""

import functools
import operator
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from cudnn_flex_compile.torch_private import (
    BINDINGS,
    PREDISPATCH,
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    schema_of,
)  # fmt: skip

PURE_OPS = {"flex_attention", "flex_attention_backward", "auto_functionalized", "auto_functionalized_v2",
            "triton_kernel_wrapper_functional"}  # fmt: skip
OPERATORS = {f for n, f in vars(operator).items() if isinstance(f, types.BuiltinFunctionType) and "call" not in n}
WRITING_OPERATORS = {
    operator.setitem,
    operator.delitem,
    *(f for n, f in vars(operator).items() if n.startswith("__i") and f"__{n[3:]}" in vars(operator)),
}
# Functions of symbolic numbers in Python: these compute with numbers alone (sym_max and its like, public or not).
OF_NUMBERS = {
    f for n, f in vars(torch).items() if n.startswith(("sym_", "_sym_")) and isinstance(f, types.FunctionType)
}
C_FUNCTIONS = types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType


def target_of(node: Node) -> Any:
    """The function, module or method that a node calls."""
    if node.op == "call_function":
        return node.target
    name = str(node.target)
    if node.op == "call_module":
        root = node.graph.owning_module
        return root and root.get_submodule(name)
    in_operator = getattr(operator, name, None) if name.startswith("__") else None
    return in_operator or getattr(torch.Tensor, name, name)


def module_of(function: Any) -> str:
    return getattr(function, "__module__", None) or ""


class Marks(NamedTuple):
    """The facts that the schemas of an op's overloads state of its arguments.

    Attributes:
        positions, names: the arguments that are written into.
        random: whether it draws random numbers.
    """

    positions: frozenset[int]
    names: frozenset[str]
    random: bool

    def written(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        by_position = [args[i] for i in self.positions if i < len(args)]
        return by_position + [kwargs[name] for name in self.names if name in kwargs]


@functools.lru_cache(maxsize=4096)
def marks_of(target: Any) -> Marks | None:
    """The marks of a target; None if it is not one op, or if an argument is an object with hidden state."""
    if target in OPERATORS or target in OF_NUMBERS:
        return Marks(frozenset({0} if target in WRITING_OPERATORS else ()), frozenset(), False)
    if isinstance(target, HigherOrderOperator):
        return Marks(frozenset(), frozenset(), False) if target.name() in PURE_OPS else None
    overloads = _overloads(target)
    arguments = [list(schema_of(op).arguments) for op in overloads]
    if not overloads or any(a.type.kind() == "ClassType" for every in arguments for a in every):
        return None
    positions = {i for every in arguments for i, a in enumerate(every) if _written(a) and not a.kwarg_only}
    names = {a.name for every in arguments for a in every if _written(a)}
    random = any(torch.Tag.nondeterministic_seeded in op.tags for op in overloads)
    return Marks(frozenset(positions), frozenset(names | {"out"}), random)


def _written(argument: Any) -> bool:
    """Whether an argument is written into. The schemas of batch_norm and its kind omit it for running statistics."""
    return argument.is_write or argument.name.startswith("running_")


def _overloads(target: Any) -> list[Any]:
    """The overloads of the op that a target is, or stands for."""
    if isinstance(target, OpOverload):
        return [target]
    packet: Any = target
    if not isinstance(target, OpOverloadPacket):
        method = getattr(target, "__objclass__", None) in torch.Tensor.__mro__
        plain = isinstance(target, C_FUNCTIONS) or module_of(target) == PREDISPATCH
        bound = plain and (method or module_of(target) in BINDINGS)
        packet = getattr(torch.ops.aten, target.__name__, None) if bound else None
    known = isinstance(packet, OpOverloadPacket)
    return [getattr(packet, name) for name in packet.overloads()] if known else []
