"""Writes nodes as Dynamo leaves them: each has the example value that later readers of the graph expect.

The other files of this folder write by it. An example is recorded when its node is written, because the next node may
ask for it.
"""

import contextlib
from typing import Any

import torch
from torch.fx import Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.passes.read.call import example


def record(node: Node, mode: Any) -> Node:
    """Records the example of a node, by running its function or method on the examples of its arguments, in Dynamo's
    fake mode.
    """
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), example)  # pyright: ignore
    target: Any = node.target
    with mode:
        result = getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)
    torch_private.set_example(node, result)
    return node


def size_of(node: Node, dim: int, before: Node) -> Any:
    """A size of a node's tensor: a number, or for one that may change its node, written above `before`."""
    size = example(node).shape[dim]
    if isinstance(size, int):
        return size
    with before.graph.inserting_before(before):
        found = before.graph.call_method("size", (node, dim))
    torch_private.set_example(found, size)
    return found


class Tracer(GraphAppendingTracer):
    """Writes nodes for computations with proxies, within its context, above a node.

    Args:
        before: the node.
        mode: Dynamo's fake mode.
    """

    def __init__(self, before: Node, mode: Any) -> None:
        super().__init__(before.graph)
        self._before, self._mode = before, mode
        self._contexts = contextlib.ExitStack()

    def __enter__(self) -> "Tracer":
        self._contexts.enter_context(self.graph.inserting_before(self._before))
        self._contexts.enter_context(_ProxyFactories(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._contexts.close()

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        return record(super().create_node(*args, **kwargs), self._mode)

    def size(self, node: Node, dim: int) -> Any:
        """A size of a node's tensor: a number or a proxy."""
        size = size_of(node, dim, self._before)
        return Proxy(size, self) if isinstance(size, Node) else size


class _ProxyFactories(torch.overrides.TorchFunctionMode):
    """Writes tensor factories (arange, full), which take no proxies, as nodes too."""

    FACTORIES = (torch.arange, torch.full)

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.FACTORIES:
            return self.tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
