"""Finds the flex_attention calls of a Dynamo graph and reads their arguments.

Knows nothing of what becomes of them. The node's signature differs between torch versions: the mask function
is the last element of the block mask tuple, the block sizes are the two before it, outputs go by position.
"""

import itertools
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.passes.caller import running_line

FLEX_ATTENTION: Any = getattr(torch.ops.higher_order, "flex_attention", None)  # a torch without has no such calls
IN_PLACE = {"setitem", "__setitem__", *(n for n in dir(operator) if n.startswith("i") and hasattr(operator, n[1:]))}
NO_BLOCKS = 1 << 30  # the block size that flex_attention gives an absent BlockMask


@dataclass(frozen=True, slots=True)
class Call:
    """One flex_attention node.

    Attributes:
        graph_module: the module in whose graph the node is.
        node: the node.
        query, key, value: nodes of [B, H, S, D] tensors.
        score_mod, mask_mod: subgraphs of 0-d tensors.
        blocks: (kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, q_num_blocks, q_indices,
            full_q_num_blocks, full_q_indices), nodes or None; empty without a BlockMask.
        block_sizes: of q and kv.
        scale: a number or a node.
        kernel_options: the user's, and flex_attention's defaults.
        score_captured, mask_captured: nodes or integers, the last arguments of the subgraphs.
    """

    graph_module: GraphModule
    node: Node
    query: Node
    key: Node
    value: Node
    score_mod: GraphModule
    mask_mod: GraphModule
    blocks: tuple[Node | None, ...]
    block_sizes: tuple[Any, Any]
    scale: Any
    kernel_options: dict[str, Any]
    score_captured: tuple[Any, ...]
    mask_captured: tuple[Any, ...]

    @property
    def captured(self) -> list[Node]:
        """The nodes that score_mod and mask_mod read."""
        return [value for value in (*self.score_captured, *self.mask_captured) if isinstance(value, Node)]

    def output(self, position: int) -> list[Node]:
        """The getitem nodes of one output: 0 out, 1 log-sum-exp in base 2, 2 largest score in base 2."""
        return [u for u in self.node.users if u.target is operator.getitem and u.args[1] == position]

    def uses(self, position: int) -> bool:
        """Whether the output reaches a result of the graph, or something with an effect.

        HuggingFace's models, for one, scale the LSE and drop it.
        """
        dead = _read_once(_dead, self.node.graph, _dead_names)
        return any(user.name not in dead for node in self.output(position) for user in node.users)

    def differentiates(self, position: int) -> bool:
        """Whether a gradient may flow from a result of the graph to the output; not if all of its uses are detached."""
        seen, left = set(self.output(position)), list(self.output(position))
        while left:
            node = left.pop()
            if node.op == "output" or (node not in self.output(position) and _has_effect(node)):
                return True
            if _may_require_grad(torch_private.example_of(node, True)):
                left += [user for user in node.users if user not in seen]
                seen.update(node.users)
        return False

    @property
    def source(self) -> str:
        """The line of the user's code that made the call, as Dynamo recorded it. Where flex_attention was compiled by
        itself, Dynamo records none of it: the line that called what is being compiled.
        """
        lines = [line.strip() for line in str(self.node.meta.get("stack_trace", "")).splitlines()]
        places = [i for i, line in enumerate(lines) if line.startswith("File ") and "flex_attention.py" not in line]
        if not places:
            return running_line() or "unknown source"
        last = places[-1]
        code = lines[last + 1] if last + 1 < len(lines) else ""
        return f"{lines[last]}: {code}" if code else lines[last]


def _dead_names(graph: Graph) -> frozenset[str]:
    """The nodes that reach no result of the graph, and nothing with an effect."""
    dead: set[str] = set()
    for node in reversed(graph.nodes):
        if not _has_effect(node) and all(user.name in dead for user in node.users):
            dead.add(node.name)
    return frozenset(dead)


def _may_require_grad(value: Any) -> bool:
    """Whether what Dynamo recorded for a node, a tensor or several, requires a gradient; or is something else."""
    if isinstance(value, (tuple, list)):
        return any(_may_require_grad(v) for v in value)  # pyright: ignore[reportUnknownVariableType]
    return value.requires_grad if isinstance(value, torch.Tensor) else True


def _has_effect(node: Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.is_impure() or node.target is operator.setitem or str(name).endswith("_")


def scale_of(call: Call) -> float | None:
    """The scale; one that depends on sizes alone is specialized, as head dims are. None if it is data."""
    value = example(call.scale)
    if isinstance(value, torch.Tensor):
        return None
    try:
        return float(value)
    except (TypeError, GuardOnDataDependentSymNode):
        return None


def hint(size: Any) -> int:
    """A size as it is in the call that is being compiled; makes no guard."""
    return size if isinstance(size, int) else int(torch_private.hint_of(size))


def is_data(size: Any) -> bool:
    """Whether a size or a number depends on data, so that it has no value before the call runs."""
    return isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) and torch_private.hint_of(size) is None


def example(value: Any) -> Any:
    """The fake tensor or symbolic number that Dynamo recorded for a node; other values as they are."""
    return torch_private.example_of(value) if isinstance(value, Node) else value


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """The nodes, and all that they are computed from."""
    seen: set[Node] = set()
    ahead = list(nodes)
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            ahead += node.all_input_nodes
    return seen


def changes(tensors: Sequence[Any], before: Node) -> tuple[Node, ...]:
    """The nodes of the graph above `before` that change one of the tensors, or what it is a view of, in place."""
    graph, storages = before.graph, {_storage(t) for t in tensors} - {None}
    names = _read_once(_writers, graph, _writer_names) if storages else ()
    above = itertools.takewhile(lambda node: node is not before, graph.nodes if names else ())
    writers = (node for node in above if node.name in names)
    return tuple(node for node in writers if any(_storage(t) in storages for t in written(node)))


def _writer_names(graph: Graph) -> frozenset[str]:
    """The nodes that change a tensor in place."""
    return frozenset(n.name for n in graph.nodes if any(_storage(t) is not None for t in written(n)))


# What is read of a graph once, as Dynamo made it: the pass writes no node that changes a tensor, and none that is dead.
# By name, for a node would keep its graph alive.
Names = frozenset[str]
_dead: "weakref.WeakKeyDictionary[Graph, Names]" = weakref.WeakKeyDictionary()
_writers: "weakref.WeakKeyDictionary[Graph, Names]" = weakref.WeakKeyDictionary()


def _read_once(known: "weakref.WeakKeyDictionary[Graph, Names]", graph: Graph, read: Callable[[Graph], Names]) -> Names:
    if graph not in known:
        known[graph] = read(graph)
    return known[graph]


def _storage(value: Any) -> int | None:
    tensor = torch_private.example_of(value, None) if isinstance(value, Node) else None
    try:
        return torch_private.storage_of(tensor) if isinstance(tensor, torch.Tensor) else None
    except NotImplementedError:  # inside vmap, as create_block_mask is
        return None


def written(node: Node) -> list[Any]:
    """The arguments that a node changes in place."""
    if isinstance(node.target, torch_private.OpOverload):
        arguments = torch_private.schema_of(node.target).arguments
        given = [node.kwargs.get(a.name, node.args[i] if i < len(node.args) else None) for i, a in enumerate(arguments)]
        return [v for a, v in zip(arguments, given, strict=True) if a.is_write]
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE or node.kwargs.get("inplace")
    return [*(node.args[:1] if in_place and node.op.startswith("call_") else ()), node.kwargs.get("out")]


def find_calls(graph_module: GraphModule) -> Iterator[Call]:
    """All calls, also those in nested graphs such as checkpointed regions, in the order of execution.

    A call in a graph that is called several times comes as many times.
    """
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is FLEX_ATTENTION:
            yield read_call(graph_module, node)
            continue
        for argument in node.args:
            nested = _submodule(graph_module, argument)
            if nested is not None:
                yield from find_calls(nested)


def _submodule(graph_module: GraphModule, argument: Any) -> GraphModule | None:
    if not isinstance(argument, Node) or argument.op != "get_attr":
        return None
    found: Any = graph_module
    for name in str(argument.target).split("."):
        found = getattr(found, name)
    return found if isinstance(found, GraphModule) else None


def read_call(graph_module: GraphModule, node: Node) -> Call:
    """The call that a flex_attention node of the module's graph is."""
    query, key, value, score_mod, block_mask, scale, kernel_options, *captured = node.args
    mask: Any = block_mask
    block_sizes = mask[-3], mask[-2]
    absent = all(size == NO_BLOCKS for size in block_sizes) and _made_here(mask[2])
    score_graph, mask_graph = (_submodule(graph_module, m) for m in (score_mod, mask[-1]))
    if score_graph is None or mask_graph is None:
        raise TypeError(f"flex_attention's score_mod and mask_mod are {score_mod}, {mask[-1]}: expected subgraphs")
    empty: tuple[Any, ...] = ()
    score_captured, mask_captured = (*captured, empty, empty)[:2]
    arguments: Any = (query, key, value)
    return Call(
        graph_module,
        node,
        *arguments,
        score_mod=score_graph,
        mask_mod=mask_graph,
        blocks=() if absent else tuple(mask[2:10]),
        block_sizes=block_sizes,
        scale=scale,
        kernel_options=dict(kernel_options),  # pyright: ignore[reportArgumentType, reportCallIssue]
        score_captured=tuple(score_captured),  # pyright: ignore[reportArgumentType]
        mask_captured=tuple(mask_captured),  # pyright: ignore[reportArgumentType]
    )


def _made_here(kv_num_blocks: Any) -> bool:
    """Whether flex_attention made the block mask itself, in the graph, because there was none."""
    return isinstance(kv_num_blocks, Node) and kv_num_blocks.target is torch.ones
