"""Traces a score_mod or mask_mod into an ATen graph: make_fx on 0-d tensors, under autograd and its grad modes.

trace.py reads the graph into an expression; this file works on torch's graphs and tensors alone. Tracing shows what a
function computes, but not which gradients it stops: `detach`, `.data`, grad modes, inference mode and
autograd.Functions act on autograd, above the ops. So functions are traced on inputs that require gradients, and each
result that has lost its own is marked by a `detach`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from cudnn_flex_compile import torch_private

Function = Callable[..., Any]


class OwnGradient(Exception):
    """A function has a gradient that its ops do not tell; the message names what gives it one."""


def value_graph(function: Function, inputs: Sequence[Any]) -> GraphModule:
    """The graph of ATen ops of a function of 0-d tensors, with a `detach` wherever a gradient stops.

    Args:
        inputs: fake tensors, which require grad where a gradient is asked for, and integers, which become constants.

    Raises:
        OwnGradient: where a hook or the backward of an autograd.Function has a part in a gradient.
    """

    def marked(*args: Any) -> Any:
        with torch.enable_grad(), _Stops():
            value = function(*args)
        _check(value)
        return value

    traced = _traced(marked, inputs)
    for node in traced.graph.find_nodes(op="call_function", target=STOP):
        node.target = torch.ops.aten.detach.default
    traced.recompile()
    return traced


# The mark of a lost gradient while a function is traced: torch 2.14 traces `detach` as an `alias`, which loses none.
STOP = torch.ops.aten.detach_copy.default


def joint_graph(function: Function, inputs: Sequence[Any], learned: Sequence[int]) -> GraphModule:
    """The graph of (value, slope, change): the function's value, its derivative by its first input, and its derivative
    by the learned tensors in given directions, if there are any.

    The graph takes the function's inputs, and then one direction for each learned tensor. The derivatives are
    autograd's, in reverse mode.

    Args:
        inputs: fake tensors and integers; the first, and those at the positions `learned`, require grad.
    """
    count = len(inputs)

    def joint(*args: Any) -> tuple[torch.Tensor, ...]:
        given = list(args[:count])
        with torch.enable_grad():
            step = torch.zeros_like(given[0]).requires_grad_()
            moved = {id(given[i]): (step, direction) for i, direction in zip(learned, args[count:], strict=True)}
            for i in learned:
                given[i] = _moved(given[i], *moved[id(given[i])]) if given[i].dim() == 0 else given[i]
            with _Moved(moved):
                value = function(*given)
        by = (given[0], step) if learned else (given[0],)
        found = torch.autograd.grad(value, by, allow_unused=True) if value.requires_grad else (None,) * len(by)
        return value, *(torch.zeros_like(x) if g is None else g for x, g in zip(by, found, strict=True))

    directions = [torch.empty_like(inputs[i], requires_grad=False) for i in learned]
    return _traced(joint, [*inputs, *directions])


def without_sums(module: GraphModule) -> GraphModule:
    """A graph of ATen ops with zeros in place of float sums over vectors, in place: all that a score_mod adds as dots.
    """
    for node in list(module.graph.nodes):
        packet = getattr(node.target, "overloadpacket", None)
        if node.op != "call_function" or getattr(packet, "__name__", "") not in SUMS:
            continue
        result, before = node.meta["val"], node.args[0].meta["val"]
        if result.is_floating_point() and before.numel() > result.numel():
            with module.graph.inserting_before(node):
                how: Any = {"dtype": result.dtype, "device": result.device}
                zeros = module.graph.call_function(torch.ops.aten.zeros.default, (list(result.shape),), how)
            zeros.meta = dict(node.meta)
            node.replace_all_uses_with(zeros)
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


SUMS = ("sum", "dot", "vdot", "mv", "mm", "bmm")


def _traced(function: Function, inputs: Sequence[Any]) -> GraphModule:
    with torch.inference_mode(False):
        return make_fx(function, tracing_mode="real")(*inputs)


def fake_mode() -> Any:
    return torch_private.fake_mode_type(allow_non_fake_inputs=True)


class IndexByTensors(TorchFunctionMode):
    """Reads `captured[h, q]` as an index op at every index, also at a 0-d tensor, whose value torch would ask for.

    Inductor traces by such a mode, too (torch._dynamo._trace_wrapped_higher_order_op), but by an autograd.Function.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            source, indices = args[0], _leaves(args[1])
            if all(isinstance(i, (torch.Tensor, int)) for i in indices):
                return self.read(source, [_as_index(i, source.device) for i in indices])
        return func(*args, **(kwargs or {}))

    def read(self, source: torch.Tensor, indices: list[torch.Tensor]) -> torch.Tensor:
        return torch.ops.aten.index(source, indices)


def _leaves(value: Any) -> list[Any]:
    return [leaf for v in value for leaf in _leaves(v)] if isinstance(value, (tuple, list)) else [value]


def _as_index(i: Any, device: torch.device) -> torch.Tensor:
    return torch.tensor(i, dtype=torch.int64, device=device) if isinstance(i, int) else i


class _Moved(IndexByTensors):
    """Reads `captured[h, q]` as it is when `captured` has gone a step, which is zero, in a direction."""

    def __init__(self, moved: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.moved = moved

    def read(self, source: torch.Tensor, indices: list[torch.Tensor]) -> torch.Tensor:
        entry = super().read(source, indices)
        if id(source) not in self.moved:
            return entry
        step, direction = self.moved[id(source)]
        return _moved(entry, step, super().read(direction, indices))


def _moved(entry: torch.Tensor, step: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    return entry + step * direction


class _Stops(IndexByTensors):
    """Detaches each result once more that has lost the gradient of an argument, so that the trace shows the loss."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in _leaves([*args, *(kwargs or {}).values()]) if isinstance(t, torch.Tensor)]
        differentiated = any(t.requires_grad for t in tensors)
        result = super().__torch_function__(func, types, args, kwargs)
        _check_hooks(tensors)
        lost = differentiated and isinstance(result, torch.Tensor) and not result.requires_grad
        return STOP(result.detach()) if lost and result.is_floating_point() else result


def _check_hooks(tensors: Sequence[torch.Tensor]) -> None:
    if any(map(torch_private.has_hooks, tensors)):
        raise OwnGradient("a hook on a gradient")


def _check(value: torch.Tensor) -> None:
    """Raises OwnGradient where a hook or an autograd.Function gives a value another gradient than its ops do."""
    _check_hooks([value])
    seen: set[Any] = set()
    ahead = [value.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, BackwardCFunction):
            raise OwnGradient("an autograd.Function, which has a backward of its own")
        seen.add(node)
        ahead += [before for before, _ in node.next_functions]


def plain(function: Function) -> Function:
    """Dynamo's graph of a function with three steps replaced, so that it can be traced.

    `captured.item()` becomes the 0-d tensor itself, with which arithmetic works as with a Python number. Inference mode
    becomes the grad mode that it sets: no tensor of a trace is an inference tensor. `x.data` becomes `x.detach()`.
    """
    if not isinstance(function, GraphModule):
        return function
    copied: dict[Node, Node] = {}
    graph = Graph()
    graph.output(graph.graph_copy(function.graph, copied))
    for node in list(graph.nodes):
        if node.op == "call_method" and node.target == "item":
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.op == "call_function":
            reads_data = getattr(node.target, "__name__", "") == "_get_data_attr"  # no mode sees this function of C
            node.target = torch.detach if reads_data else GRAD_MODES.get(node.target, node.target)
    return GraphModule(function, graph)


def _enter(inference: bool = True) -> bool:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(not inference)
    return before


def _exit(before: bool) -> None:
    torch.set_grad_enabled(before)


GRAD_MODES: dict[Any, Function] = {
    torch_private.enter_inference_mode: _enter, torch_private.exit_inference_mode: _exit,
}  # fmt: skip
