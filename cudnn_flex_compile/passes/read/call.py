"""Finds the flex_attention calls of a Dynamo graph and reads their arguments.

All other files of passes/ get a call as the `Call` that is read here. The node's signature differs between versions of
torch: the mask function is the last element of the block mask tuple, the block sizes are the two before it, and outputs
go by position.
"""

import operator
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.passes.read.caller import running_line
from cudnn_flex_compile.passes.read.effects import has_effect, submodule

FLEX_ATTENTION: Any = getattr(torch.ops.higher_order, "flex_attention", None)  # None in a torch that has no such op
NO_BLOCKS = 1 << 30  # the block size that flex_attention gives an absent BlockMask
# Names of the dead nodes of a graph as Dynamo made it; the pass adds none. Names, because nodes keep a graph alive.
_dead: "weakref.WeakKeyDictionary[Graph, frozenset[str]]" = weakref.WeakKeyDictionary()


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
        block_sizes: the BlockMask's block sizes of q and kv.
        scale: a number or a node.
        kernel_options: the user's, and flex_attention's defaults.
        score_captured, mask_captured: nodes or integers, the last arguments of the subgraphs.
        mode: autograd's mode at the node.
        agrees: whether the blocks are known to be those of the mask_mod, so that nothing has to look at them.
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
    mode: "Mode"
    agrees: bool = False

    @property
    def differentiated(self) -> bool:
        """Whether autograd asks score_mod for a gradient, as stock flex_attention has it."""
        return self.mode.grad and any(
            requires_grad(n) for n in (self.query, self.key, self.value, *self.score_captured)
        )

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
        graph = self.node.graph
        if graph not in _dead:
            _dead[graph] = _dead_names(graph)
        return any(user.name not in _dead[graph] for node in self.output(position) for user in node.users)

    def differentiates(self, position: int) -> bool:
        """Whether a gradient may flow from a result of the graph to the output; not if all of its uses are detached."""
        seen, left = set(self.output(position)), list(self.output(position))
        while left:
            node = left.pop()
            if node.op == "output" or (node not in self.output(position) and has_effect(node)):
                return True
            if _may_require_grad(torch_private.example_of(node, True)):
                left += [user for user in node.users if user not in seen]
                seen.update(node.users)
        return False

    @property
    def source(self) -> str:
        """The line of the user's code that made the call, as Dynamo recorded it.

        Dynamo records none where flex_attention was compiled by itself; then it is the line that called the function
        that is being compiled.
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
        if all(user.name in dead for user in node.users) and not has_effect(node):
            dead.add(node.name)
    return frozenset(dead)


def _may_require_grad(value: Any) -> bool:
    """Whether the value that Dynamo recorded for a node may require a gradient: a tensor or several that do, or
    anything that is no tensor.
    """
    if isinstance(value, (tuple, list)):
        return any(_may_require_grad(v) for v in value)  # pyright: ignore[reportUnknownVariableType]
    return value.requires_grad if isinstance(value, torch.Tensor) else True


def scale_of(call: Call) -> float | None:
    """The scale as a number, or None if it depends on data. A scale of symbolic sizes is specialized, as head dims are.
    """
    value = example(call.scale)
    if isinstance(value, torch.Tensor):
        return None
    try:
        return float(value)
    except (TypeError, GuardOnDataDependentSymNode):
        return None


def hint(size: Any) -> int:
    """The size in the call that is being compiled. It makes no guard."""
    return size if isinstance(size, int) else int(torch_private.hint_of(size))


def is_data(size: Any) -> bool:
    """Whether a size or a number depends on data, so that it has no value before the call runs."""
    return isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) and torch_private.hint_of(size) is None


def example(value: Any) -> Any:
    """The fake tensor or symbolic number that Dynamo recorded for a node; another value is returned as it is."""
    return torch_private.example_of(value) if isinstance(value, Node) else value


def requires_grad(value: Any) -> bool:
    tensor = example(value)
    return isinstance(tensor, torch.Tensor) and tensor.requires_grad


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """The nodes, and all nodes from which they are computed."""
    seen: set[Node] = set()
    ahead = list(nodes)
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            ahead += node.all_input_nodes
    return seen


class Mode(NamedTuple):
    """Autograd's mode at a call: whether it records gradients, and whether the graph has entered inference mode."""

    grad: bool
    inference: bool = False


def find_calls(graph_module: GraphModule, mode: Mode | None = None) -> Iterator[Call]:
    """All calls, also those in nested graphs such as checkpointed regions, in the order of execution.

    A call in a graph that is called several times comes as many times.

    Args:
        mode: the mode in which the graph starts; None for the mode of its compile, on which Dynamo has a guard.
    """
    calls: list[tuple[Node, GraphModule | None, Mode]] = []  # calls of flex_attention, or of a nested graph
    for node, current in _modes(graph_module.graph, mode or Mode(torch.is_grad_enabled())):
        if node.target is FLEX_ATTENTION:
            calls.append((node, None, current))
            continue
        for argument in node.args:
            if isinstance(argument, Node) and argument.op == "get_attr":
                nested = submodule(graph_module, argument)
                calls += [] if nested is None else [(node, nested, current)]
    recorded = {nested for _, nested, current in calls if current.grad}
    for node, nested, current in calls:
        if nested is None:
            yield read_call(graph_module, node, current)
        else:  # a nested graph, which may be called in several modes
            yield from find_calls(nested, current._replace(grad=nested in recorded))


def _modes(graph: Graph, mode: Mode) -> Iterator[tuple[Node, Mode]]:
    """The calls of functions, each with its mode; the first has the mode that is given."""
    before: dict[Any, Mode] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        yield node, mode
        if node.target is torch_private.set_grad_mode:
            mode = mode._replace(grad=bool(node.args[0]))
        elif node.target is torch_private.enter_inference_mode:
            before[node], mode = mode, Mode(not node.args[0], bool(node.args[0]))
        elif node.target is torch_private.exit_inference_mode:
            mode = before[node.args[0]]


def read_call(graph_module: GraphModule, node: Node, mode: Mode) -> Call:
    """Reads a flex_attention node of the module's graph."""
    query, key, value, score_mod, block_mask, scale, kernel_options, *captured = node.args
    mask: Any = block_mask
    block_sizes = mask[-3], mask[-2]
    absent = all(size == NO_BLOCKS for size in block_sizes) and _made_here(mask[2])
    score_graph, mask_graph = (submodule(graph_module, m) for m in (score_mod, mask[-1]))
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
        mode=mode,
    )


def _made_here(kv_num_blocks: Any) -> bool:
    """Whether flex_attention made the block mask itself, in the graph, because it got none."""
    return isinstance(kv_num_blocks, Node) and kv_num_blocks.target is torch.ones
