"""Writes the operands of calls into the surrounding graph, as nodes that the inner backend fuses.

scoremod/partition.py says which parts of a program are operands. Each is written once for a graph: calls that need the
same value share it, unless a node between them may write into a tensor that it is computed from (effects.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule, Node, Proxy
from torch.fx.experimental.proxy_tensor import make_fx

from cudnn_flex_compile import ops, torch_private
from cudnn_flex_compile.passes.decide.key_compaction import counts_of, order_of, slots_of
from cudnn_flex_compile.passes.read.call import example
from cudnn_flex_compile.passes.read.effects import Writers
from cudnn_flex_compile.passes.write.nodes import Tracer, record
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.hoisting import LENGTH, computed
from cudnn_flex_compile.scoremod.ir import F32, Expr
from cudnn_flex_compile.scoremod.partition import Hoisted

Made = TypeVar("Made")


def operand_value(
    hoisted: Hoisted, captured: Callable[[Expr], Any], sizes: tuple[Any, ...], device: torch.device
) -> Any:
    """The operand, [B or 1, H or 1, Sq or 1, Skv or 1].

    Args:
        hoisted: the operand's expression, and the dtype in which it is kept.
        captured: gives the tensor or number of a capture or scalar leaf.
        sizes: the sizes of the axes b, h, q, k.
        device: the device of the result.

    It takes tensors, and FX proxies, for which it writes the nodes that compute the operand.
    """

    plain = _as_it_is(hoisted, captured, sizes)
    if plain is not None:
        return plain

    def value(node: Expr) -> Any:
        return _summed_in_float32(captured(node)) if hoisted.learned and node.dtype == F32 else captured(node)

    return computed(hoisted, value, sizes, device, _size_of)


def _summed_in_float32(tensor: Any) -> Any:
    """A captured tensor as float32, because its gradient is a sum over many pairs, for which 16 bits are too few."""
    return tensor if _known_tensor(tensor).dtype == torch.float32 else tensor.to(torch.float32)


def _size_of(tensor: Any, dim: int) -> Any:
    if not isinstance(tensor, Proxy):
        return tensor.shape[dim]
    tracer: Any = tensor.tracer
    return tracer.size(tensor.node, dim)


def _known_tensor(tensor: Any) -> torch.Tensor:
    return example(tensor.node) if isinstance(tensor, Proxy) else tensor


def _as_it_is(hoisted: Hoisted, captured: Callable[[Expr], Any], sizes: tuple[Any, ...]) -> Any:
    """A view of the captured tensor, if the operand is one: slopes[h], bias[h, q, kv]. It needs no kernel."""
    root = hoisted.expression
    if hoisted.limit:
        return None
    axes = [str(a.value) for a in root.args[1:] if a.kind == "index"] if root.kind == "gather" else []
    if not axes or len(axes) < len(root.args) - 1 or "".join(axes) != hoisted.dims:
        return None
    tensor = captured(root.args[0])
    shape = [size if axis in axes else 1 for axis, size in zip(ir.AXES, sizes, strict=True)]
    known = _known_tensor(tensor)
    exact = [n for axis, n in zip(ir.AXES, shape, strict=True) if axis in axes]
    static = all(isinstance(n, int) for n in (*exact, *known.shape))
    same = static and list(known.shape) == exact and known.dtype == hoisted.stored and known.is_contiguous()
    return tensor.view(*shape) if same else None


@dataclass(frozen=True, slots=True)
class KeyOrder:
    """The nodes of COUNTS, of the key that comes to each place, and of the place to which each key goes
    (passes/decide/key_compaction.py).
    """

    counts: Node
    order: Node
    slots: Node


class Writer:
    """Writes operands into graphs, each once for all calls that need the same value.

    Args:
        root: the graph that Dynamo made; others are nested in it.
    """

    def __init__(self, root: GraphModule) -> None:
        self.writers = Writers(root)
        self._written: dict[tuple[Any, ...], Any] = {}

    def forget(self) -> None:
        """Writes everything again from now on. Nodes that were written stay for their users."""
        self._written.clear()

    def once(self, kind: tuple[Any, ...], sources: Sequence[Any], before: Node, write: Callable[[], Made]) -> Made:
        """The result of `write` above `before`. All that ask for one kind with the same sources share it, until a node
        may write into one of the sources.
        """
        shared = (before.graph, *kind, *sources, self.writers.above(sources, before))
        if shared not in self._written:
            self._written[shared] = write()
        return self._written[shared]

    def write(self, hoisted: Hoisted, captured: dict[Expr, Any], query: Node, key: Node, before: Node) -> Node:
        """The node of an operand, above `before`."""

        def write() -> Node:
            with Tracer(before, example(query).fake_mode) as tracer:
                return self._trace(hoisted, captured, query, key, tracer)

        leaves = [n for n in ir.walk(hoisted.expression) if n.kind in ("capture", "scalar") and n is not LENGTH]
        sizes = tuple(_known(example(n).shape[d]) for n, d in ((query, 0), (query, 1), (query, 2), (key, 2)))
        kind = ("operand", hoisted, *sizes, example(query).device)
        return self.once(kind, [captured[n] for n in leaves], before, write)

    def write_order(self, columns: Node, key: Node, before: Node) -> KeyOrder:
        """Writes the order in which the keys that `columns` shows are first, above `before`."""

        def write() -> KeyOrder:
            with Tracer(before, example(key).fake_mode) as tracer:
                bias, length = Proxy(columns, tracer), tracer.size(key, 2)
                span = torch.arange(length, dtype=torch.int64, device=example(key).device)
                counts = counts_of(bias)
                slots = slots_of(bias, counts, span)
                order = order_of(slots, span)
            return KeyOrder(counts.node, order.node, slots.node)

        return self.once(("order",), [columns], before, write)

    def write_function(self, function: Callable[..., torch.Tensor], inputs: Sequence[Node], before: Node) -> Node:
        """The node of a function's result, above `before`, for inputs of these sizes; a new one for each call."""
        fakes = [example(n) for n in inputs]
        with fakes[0].fake_mode, torch.no_grad():
            traced = make_fx(function)(*fakes)
        placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
        first = before.prev
        with before.graph.inserting_before(before):
            result: Any = before.graph.graph_copy(traced.graph, dict(zip(placeholders, inputs, strict=True)))
        node = first.next
        while node is not before:
            torch_private.set_example(node, node.meta["val"])
            node = node.next
        return result

    def permute(self, tensor: Node, order: KeyOrder, before: Node) -> Node:
        """Keys or values in this order; a new node for each call, because they may change in place."""
        with before.graph.inserting_before(before):
            node = before.graph.call_function(ops.permute_keys, (tensor, order.order, order.slots))
        return record(node, example(tensor).fake_mode)

    def _trace(self, hoisted: Hoisted, captured: dict[Expr, Any], query: Node, key: Node, tracer: Tracer) -> Node:
        def proxy(node: Expr) -> Any:
            value = captured[node]
            return Proxy(value, tracer) if isinstance(value, Node) else value

        sizes = tuple(tracer.size(n, d) for n, d in ((query, 0), (query, 1), (query, 2), (key, 2)))
        return operand_value(hoisted, proxy, sizes, example(query).device).node


def same_size(size: Any, other: Any) -> bool:
    """Whether two sizes are known to be equal, without a guard."""
    return _known(size) == _known(other)


def _known(size: Any) -> Any:
    """A size that can be compared without a guard."""
    return size if isinstance(size, int) else torch_private.expression_of(size)
