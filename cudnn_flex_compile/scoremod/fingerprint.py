"""The canonical text of Dynamo's graph of a score_mod or mask_mod: functions with equal texts compute the same.

Verdicts about plans are stored by this text, and calls with equal texts are traced once. Nodes are numbered, because
their names differ between layers. A graph that holds anything but plain data and functions of torch or Python has no
text, since two things of one name may differ.
"""

import inspect
from typing import Any

import torch
from torch.fx import GraphModule, Node

from cudnn_flex_compile import torch_private

PLAIN = (bool, int, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
NAMESPACES = ("aten", "prims")
HOMES = ("_operator", "builtins", "math", "torch")


def graph_text(module: Any) -> str | None:
    """One line for each node, or None where some value has no text."""
    if not isinstance(module, GraphModule):
        return None
    numbers = {node: i for i, node in enumerate(module.graph.nodes)}
    try:
        return "\n".join(_line(node, numbers) for node in module.graph.nodes)
    except _NoText:
        return None


class _NoText(Exception):
    """A value whose meaning its text would not tell."""


def _line(node: Node, numbers: dict[Node, int]) -> str:
    if node.op in ("placeholder", "output"):
        return f"{node.op} {_text(node.args, numbers)}"
    if node.op not in ("call_function", "call_method"):  # get_attr, call_module: state of the module
        raise _NoText
    target = node.target if isinstance(node.target, str) else _function(node.target)
    return f"{node.op} {target} {_text(node.args, numbers)} {_text(node.kwargs, numbers)}"


def _function(target: Any) -> str:
    if isinstance(target, torch_private.OpOverload):
        if target.namespace not in NAMESPACES:
            raise _NoText
        return str(target)
    module = getattr(target, "__module__", None) or "torch"  # torch's own builtins have none
    name = getattr(target, "__qualname__", None)
    if name is None or "<" in name or module.split(".")[0] not in HOMES or inspect.ismethod(target):
        raise _NoText
    return f"{module}.{name}"


def _text(value: Any, numbers: dict[Node, int]) -> str:
    match value:
        case Node():
            return f"%{numbers[value]}"
        case float():
            return f"float {value.hex()}"
        case tuple() | list():
            return f"{type(value).__name__}({', '.join(_text(v, numbers) for v in value)})"
        case slice():
            return f"slice({_text((value.start, value.stop, value.step), numbers)})"
        case dict():
            return f"dict({', '.join(f'{k!r}: {_text(v, numbers)}' for k, v in sorted(value.items()))})"
        case _ if isinstance(value, PLAIN):
            return f"{value!r}"
        case _:
            raise _NoText
