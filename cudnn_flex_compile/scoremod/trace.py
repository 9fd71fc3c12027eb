"""Traces a score_mod or mask_mod into an expression: an ATen graph (aten.py), then each op by aten_table.py.

passes/read/programs.py calls it with Dynamo's module of the user's function, which takes score, b, h, q, kv,
captured... The expression is exact: an op without a row in the table raises `Untraceable`, and is never skipped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.aten import OwnGradient, fake_mode, plain, value_graph
from cudnn_flex_compile.scoremod.aten_table import SMALL, Untraceable, dtype_of, read
from cudnn_flex_compile.scoremod.ir import BOOL, F32, SCORE, Expr
from cudnn_flex_compile.scoremod.vectors import MOVES, NoVector, entry, lane_dim, vector_of
from cudnn_flex_compile.scoremod.views import VIEWS, View, squeezed, view_of


@dataclass(frozen=True, slots=True)
class Captured:
    """A value that the function captured.

    Attributes:
        tensor: its fake tensor, or None for a Python integer turned symbolic.
        learned: whether it takes a gradient.
    """

    tensor: torch.Tensor | None
    leaf: Expr
    learned: bool = False


def trace(
    function: torch.nn.Module, takes_score: bool, captured: Sequence[Captured], device: torch.device,
    differentiated: bool = False,
) -> Expr:  # fmt: skip
    """The expression that `function` computes.

    Args:
        function: takes (score, b, h, q, kv, *captured) or (b, h, q, kv, *captured), all 0-d but the captured.
        takes_score: whether it is a score_mod.
        captured: in the order of the function's last arguments.
        device: where the user's tensors are.
        differentiated: whether a gradient is asked of the score.

    Returns:
        F32 for a score_mod, BOOL for a mask_mod. Leaves are SCORE, indices, constants and the leaves given
        in `captured`, read through `gather` where they are tensors. A leaf that takes a gradient is in a `stop` where
        the function lets none through. A score_mod may have a `dot` of vectors (vectors.py).

    Raises:
        Untraceable: with the op that has no row.
        OwnGradient: where no expression has the function's gradient.
    """
    with fake_mode(), torch.inference_mode(False):
        graph = _aten_graph(function, stand_ins(takes_score, captured, device, differentiated))
    leaves = [SCORE] if takes_score else []
    leaves += [ir.index(axis) for axis in ir.AXES]
    leaves += [c.leaf for c in captured]
    shapes = {c.leaf: c.tensor.shape for c in captured if c.tensor is not None}
    try:
        result = _Reader(graph, leaves, shapes).read()
    except NoVector as error:
        raise Untraceable(str(error)) from error
    if result.dtype != (F32 if takes_score else BOOL):
        raise Untraceable(f"a result of dtype {result.dtype}")
    return _only_of(result, {*([SCORE] if differentiated else []), *(c.leaf for c in captured if c.learned)})


def stand_ins(
    takes_score: bool, captured: Sequence[Captured], device: torch.device, differentiated: bool
) -> list[torch.Tensor]:  # fmt: skip
    """The function's inputs, in the current fake mode."""
    score = torch.empty((), dtype=torch.float32, device=device, requires_grad=differentiated)
    indices = [torch.empty((), dtype=torch.int32, device=device) for _ in ir.AXES]
    return [*([score] if takes_score else []), *indices, *(_stand_in(c, device) for c in captured)]


def _aten_graph(function: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> torch.fx.Graph:
    try:
        return value_graph(plain(function), inputs).graph
    except OwnGradient:
        raise
    except Exception as error:  # torch's, about a step of the user's function, such as `fbk[:, kv]` of a number
        first = str(error).strip().split("\n")[0]
        raise Untraceable(f"a step that make_fx cannot trace ({type(error).__name__}: {first})") from error


def _stand_in(captured: Captured, device: torch.device) -> torch.Tensor:
    if captured.tensor is None:
        return torch.empty((), dtype=torch.int32, device=device)
    if captured.leaf.kind == "scalar":
        return torch.empty((), dtype=torch.float32, device=device)
    sizes, tensor = [_hint(size) for size in captured.tensor.shape], captured.tensor
    return torch.empty(sizes, dtype=tensor.dtype, device=tensor.device, requires_grad=captured.learned)


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(torch_private.hint_of(size))


class _Reader:
    """Reads an ATen graph, node by node, into an expression.

    Args:
        leaves: those of its placeholders.
        shapes: the shapes of captured tensors, by leaf.
    """

    def __init__(self, graph: torch.fx.Graph, leaves: list[Expr], shapes: Mapping[Expr, Sequence[Any]]) -> None:
        self.graph, self.shapes = graph, shapes
        self.values: dict[torch.fx.Node, Any] = {}
        self.leaves = iter(leaves)

    def read(self) -> Expr:
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = next(self.leaves)
            elif node.op == "get_attr":
                self.values[node] = self._constant(getattr(self.graph.owning_module, str(node.target)))
            elif node.op == "call_function" and node.users:
                self.values[node] = self._call(node)
            elif node.op == "output":
                return self._number(node.args[0])
        raise Untraceable("a graph without an output")

    def _constant(self, tensor: Any) -> Expr:
        if not isinstance(tensor, torch.Tensor):
            raise Untraceable("an op that takes functions, such as torch.cond,")
        if tensor.numel() != 1:
            raise Untraceable("a tensor constant of several elements")
        with torch_private.without_modes():
            return ir.const(tensor.item(), dtype_of(tensor.dtype))

    def _value(self, arg: Any) -> Any:
        if isinstance(arg, torch.fx.Node):
            return self.values[arg]
        return type(arg)(self._value(a) for a in arg) if isinstance(arg, (list, tuple)) else arg

    def _number(self, result: Any) -> Expr:
        if _example(result).dim() != 0:
            raise Untraceable(f"a result of {_example(result).dim()} dimensions")
        return self._tensor(self._value(result))

    def _tensor(self, value: Any) -> Any:
        """The expression of a number or a vector; a captured tensor that is used without an index is one, too."""
        if isinstance(value, Expr) and value.kind == "capture":
            value = view_of(value, len(self.shapes[value]))
        return vector_of(value, self._shape(value.source)) if isinstance(value, View) else value

    def _shape(self, source: Expr) -> Sequence[Any]:
        return self.shapes[source.args[0] if source.kind == "stop" else source]

    def _view(self, name: str, node: torch.fx.Node, args: tuple[Any, ...]) -> View | None:
        """The rest of a captured tensor after a step of indexing, or None where the node is no such step."""
        source = args[0] if args else None
        if isinstance(source, Expr) and source.kind == "capture":
            source = view_of(source, _example(node.args[0]).dim())
        if not isinstance(source, View) or not source.left:
            return None
        sizes = _example(node.args[0]).shape
        if name == "squeeze":
            dims = args[1] if len(args) > 1 else range(len(sizes))
            return squeezed(source, sizes, (dims,) if isinstance(dims, int) else dims)
        if name == "slice" and _example(node).shape == sizes:
            return source
        if name == "index" and any(i is not None and not isinstance(i, Expr) for i in args[1]):
            raise Untraceable("an index that is a captured vector")
        return VIEWS[name](source, *args[1:]) if name in VIEWS else None

    def _call(self, node: torch.fx.Node) -> Any:
        target: Any = node.target
        name = target.overloadpacket.__name__ if isinstance(target, torch_private.OpOverload) else None
        if name is None:
            raise Untraceable(str(node.target))
        args, kwargs = self._value(node.args), {k: self._value(v) for k, v in node.kwargs.items()}
        example = node.meta["val"]
        if not isinstance(example, torch.Tensor):
            raise Untraceable(f"{name}, which has several results,")
        view = self._view(name, node, args) if not kwargs else None
        if view is not None and len(view.left) != example.dim():
            raise Untraceable("an index that is a vector")
        if view is not None:
            return view if view.left else entry(view.source, *(i for i in view.indices if i is not None))
        args = tuple(self._tensor(a) for a in args)
        _ = lane_dim(example.shape)
        _check_integers(name, node)
        first = node.args[0] if node.args else None
        return read(name, example, _example(first).shape if isinstance(first, torch.fx.Node) else (), args, kwargs)


def _example(arg: Any) -> torch.Tensor:
    return arg.meta["val"]


DO_NOT_WRAP = (
    "index", "select", "where", "clone", "detach", "alias", "contiguous", "lift_fresh_copy", "any", "all", *MOVES,
    "bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__",
)  # fmt: skip


def _only_of(root: Expr, differentiated: set[Expr]) -> Expr:
    """`root` with the stops of these leaves alone, because other leaves take no gradient."""
    stops = [n for n in ir.walk(root) if n.kind == "stop"]
    return ir.rebuild(root, {n: n.args[0] for n in stops if not differentiated & {n.args[0], *n.args[0].args[:1]}})


def _check_integers(name: str, node: torch.fx.Node) -> None:
    """Raises Untraceable where integers may wrap that the expression keeps in 32 or 64 bits.

    8- and 16-bit integers may be read, chosen, compared, masked by bits and widened, and a Python integer must fit into
    the dtype of the tensor beside it.
    """
    if node.meta["val"].dtype in SMALL and name not in DO_NOT_WRAP:
        raise Untraceable(f"{name} to {node.meta['val'].dtype}")
    whole = [a for a in node.args if isinstance(a, int)]
    for dtype in [n.meta["val"].dtype for n in node.all_input_nodes if "val" in n.meta]:
        if dtype in (*SMALL, torch.int32) and any(not _fits(number, dtype) for number in whole):
            raise Untraceable(f"{name} of {dtype} with an integer beyond it")


def _fits(number: int, dtype: torch.dtype) -> bool:
    return torch.iinfo(dtype).min <= number <= torch.iinfo(dtype).max
