"""Says which storages a node of a Dynamo graph may write into, and whether it may do anything but make its result.

The pass asks before it moves or shares work across nodes. The spelling of a write does not matter. An op is judged by
its schema; a function of several ops by the schemas of the ops that it dispatches to when it runs on the fake tensors
that Dynamo recorded; a region by the nodes inside. A function of torch that cannot be run so may write into all of its
arguments, and a function of somebody else into everything. Views of one tensor share its storage, among fake tensors as
among real ones.
"""

import contextlib
import functools
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.passes.read.schemas import marks_of, module_of, target_of
from cudnn_flex_compile.passes.read.storages import EVERYTHING, NOTHING, Storages, meet, storages
from cudnn_flex_compile.torch_private import HigherOrderOperator, OpOverload, OpOverloadPacket

WITHOUT_SOURCE = HigherOrderOperator, OpOverload, OpOverloadPacket, torch.nn.Module
WITHOUT_GLOBALS = {"torch", "builtins", "math", ""}  # packages of functions that reach no tensor but their arguments
# Higher-order ops without a region that have access to their arguments alone.
SELF_CONTAINED = {"triton_kernel_wrapper_mutation"}


class Effect(NamedTuple):
    """The effects of a node beside making its result.

    Attributes:
        writes: the storages that it may write into.
        more: whether it does, or may do, anything else: draw random numbers, set a mode.
    """

    writes: Storages
    more: bool


class Writers:
    """The nodes of graphs that may write, in order.

    They are those that Dynamo made: the pass itself adds none. The effect of a node is computed once, and only where
    the node is given a tensor that somebody wants to share.

    Args:
        root: the graph that Dynamo made, with all those nested in it.
    """

    def __init__(self, root: GraphModule) -> None:
        self._root = root
        self._candidates: dict[Graph, tuple[dict[Node, int], list[tuple[Node, Storages]]]] = {}
        self._known: dict[Node, Storages] = {}

    def above(self, values: Sequence[Any], before: Node) -> tuple[Node, ...]:
        """The nodes above `before` that may write into the storage of one of the tensors."""
        shared = storages([v for v in values if isinstance(v, Node)], missing=EVERYTHING)
        if not shared:
            return ()
        if before.graph not in self._candidates:
            self._candidates[before.graph] = _candidates(before.graph, self._moved)
        places, candidates = self._candidates[before.graph]
        near = (n for n, reached in candidates if places[n] < places[before] and meet(reached, shared))
        return tuple(n for n in near if meet(self._writes(n), shared))

    def callers(self, graph: Graph) -> list[Node]:
        """The nodes that run a nested graph; none run the root."""
        return [] if graph is self._root.graph else self._callers.get(graph, [])

    @functools.cached_property
    def _callers(self) -> dict[Graph, list[Node]]:
        found: dict[Graph, list[Node]] = {}
        for module in self._root.modules():
            for node in module.graph.nodes if isinstance(module, GraphModule) else ():
                for region in _regions(node):
                    found.setdefault(region.graph, []).append(node)
        return found

    def _writes(self, node: Node) -> Storages:
        if node not in self._known:
            self._known[node] = _blurred(effect(node).writes, self._moved)
        return self._known[node]

    @functools.cached_property
    def _moved(self) -> bool:
        """Whether a tensor gets another storage anywhere (`x.data = y`).

        Views made before that have the old storage, while Dynamo recorded the tensor with the new one.
        """
        for module in self._root.modules():
            for node in module.graph.nodes if isinstance(module, GraphModule) else ():
                if str(getattr(node.target, "__name__", node.target)).startswith("set_"):
                    return True
        return False


def _candidates(graph: Graph, moved: bool) -> tuple[dict[Node, int], list[tuple[Node, Storages]]]:
    """The place of every node, and the nodes that may write by their targets, each with the storages that it reaches.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    return places, [(node, _blurred(_reach(node), moved)) for node in places if not _settled(node)]


def _blurred(written: Storages, moved: bool) -> Storages:
    return EVERYTHING if written and moved else written


def _settled(node: Node) -> bool:
    if not node.op.startswith("call_"):
        return True
    marks = marks_of(target_of(node))
    return marks is not None and not marks.positions and marks.names.isdisjoint(node.kwargs)


def has_effect(node: Node) -> bool:
    """Whether a node does, or may do, anything but make its result."""
    if node.is_impure():
        return True
    writes, more = effect(node)
    return bool(writes) or more


def effect(node: Node) -> Effect:
    if not node.op.startswith("call_"):
        return Effect(NOTHING, False)
    target, reached = target_of(node), _reach(node)
    marks = marks_of(target)
    if marks is not None:
        return Effect(reached, marks.random)
    regions = list(_regions(node))
    if regions:
        return _inside(node, regions)
    if reached and callable(target) and not isinstance(target, WITHOUT_SOURCE):
        return _recorded(node, target) or Effect(reached, True)
    return Effect(reached, True)  # a function that is given no tensor sets a mode, or computes with sizes


def _reach(node: Node) -> Storages:
    """The storages that a node may write into, judged by its target alone."""
    target = target_of(node)
    marks = marks_of(target)
    if marks is not None:
        return storages(marks.written(node.args, node.kwargs), missing=EVERYTHING)
    self_contained = isinstance(target, HigherOrderOperator) and target.name() in SELF_CONTAINED
    function = not isinstance(target, WITHOUT_SOURCE) and not any(_regions(node))
    if self_contained or (function and module_of(target).partition(".")[0] in WITHOUT_GLOBALS):
        return storages(node.all_input_nodes)
    return EVERYTHING


def submodule(graph_module: GraphModule, argument: Any) -> GraphModule | None:
    """The graph that an argument of a node names, or None."""
    if not isinstance(argument, Node) or argument.op != "get_attr":
        return None
    found: Any = graph_module
    for name in str(argument.target).split("."):
        found = getattr(found, name)
    return found if isinstance(found, GraphModule) else None


def _regions(node: Node) -> Iterator[GraphModule]:
    """The graphs that a node runs."""
    module = node.graph.owning_module
    own = target_of(node) if node.op == "call_module" else None
    found = [own, *(submodule(module, argument) for argument in node.all_input_nodes if module is not None)]
    yield from (region for region in found if isinstance(region, GraphModule))


def _inside(node: Node, regions: Sequence[GraphModule]) -> Effect:
    """The effect of a node's regions, whose inputs have the storages of the node's arguments, or stand for some."""
    nodes = [inner for region in regions for inner in region.graph.nodes]
    effects = [effect(inner) for inner in nodes]
    written = NOTHING.union(*(e.writes for e in effects))
    inputs = storages([inner for inner in nodes if inner.op == "placeholder"])
    reached = storages(node.all_input_nodes) if meet(written, inputs) else NOTHING
    more = any(inner.op.startswith("call_") and inner.is_impure() for inner in nodes) or any(e.more for e in effects)
    return Effect(written | reached, more)


class _Recorder(torch_private.dispatch_mode):
    """Records the tensors that ops write into, and those that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.made, self.random = NOTHING, NOTHING, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        marks = marks_of(func)
        self.written |= EVERYTHING if marks is None else storages(marks.written(args, kwargs or {}))
        self.random |= marks is None or marks.random
        result = func(*args, **(kwargs or {}))
        self.made |= storages(result)
        return result


def _recorded(node: Node, function: Any) -> Effect | None:
    """The effect of a function on its arguments' storages, found by running it; None where it cannot be run."""
    given = storages(node.all_input_nodes)
    found: list[Any] = []
    map_aggregate([torch_private.example_of(n, None) for n in node.all_input_nodes], found.append)
    mode = next((value.fake_mode for value in found if torch_private.is_fake(value)), None)
    if mode is None:
        return None
    recorder = _Recorder()
    try:
        with aside(mode), torch.no_grad():
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), _alias)  # pyright: ignore
            with recorder:
                function(*args, **kwargs)
    except Exception:  # a function may raise anything for tensors without data
        return None
    if recorder.written - given - recorder.made:
        return Effect(EVERYTHING, True)
    return Effect(recorder.written & given, recorder.random)


@contextlib.contextmanager
def aside(mode: Any) -> Generator[None]:
    """Enters the fake mode so that nothing is left in its symbolic sizes."""
    with contextlib.ExitStack() as stack:
        if mode.shape_env is not None:
            stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
            stack.enter_context(mode.shape_env.suppress_guards())
        stack.enter_context(mode)
        yield


def _alias(node: Node) -> Any:
    """The tensors that were recorded for a node, as other tensors of the same storages, whose sizes a function may
    change.
    """
    value = torch_private.example_of(node)
    return map_aggregate(value, lambda each: each.data if isinstance(each, torch.Tensor) else each)
