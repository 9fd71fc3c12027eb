"""Traces a score_mod or mask_mod into an expression: an ATen graph (aten.py), then one table of ATen ops.

passes/read/programs.py calls it with Dynamo's module of the user's function, which takes score, b, h, q, kv,
captured... The expression is exact: an op without a row in the table raises `Untraceable`, and is never skipped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.aten import OwnGradient, fake_mode, plain, value_graph
from cudnn_flex_compile.scoremod.ir import BOOL, F32, I32, I64, SCORE, Expr
from cudnn_flex_compile.scoremod.optable import ROWS, make
from cudnn_flex_compile.scoremod.views import VIEWS, View, squeezed, view_of


class Untraceable(Exception):
    """`op` has no row in the op table, or is used in a way that no row describes."""

    def __init__(self, op: str) -> None:
        super().__init__(f"{op} is not in the op table")
        self.op = op


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


DTYPES = {
    torch.float32: F32, torch.float16: F32, torch.bfloat16: F32, torch.int32: I32, torch.int64: I64,
    torch.int16: I32, torch.int8: I32, torch.uint8: I32, torch.bool: BOOL,
}  # fmt: skip
HALVES = (torch.float16, torch.bfloat16)
SMALL = (torch.int16, torch.int8, torch.uint8)


def dtype_of(dtype: torch.dtype, what: str = "a tensor") -> str:
    """The dtype of expressions that holds these values. Raises Untraceable where there is none."""
    if dtype not in DTYPES:
        raise Untraceable(f"{what} of {dtype}")
    return DTYPES[dtype]


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
        the function lets none through.

    Raises:
        Untraceable: with the op that has no row.
        OwnGradient: where no expression has the function's gradient.
    """
    with fake_mode(), torch.inference_mode(False):
        graph = _aten_graph(function, stand_ins(takes_score, captured, device, differentiated))
    leaves = [SCORE] if takes_score else []
    leaves += [ir.index(axis) for axis in ir.AXES]
    leaves += [c.leaf for c in captured]
    result = _Reader(graph, leaves).read()
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
    """Reads an ATen graph, node by node, into an expression."""

    def __init__(self, graph: torch.fx.Graph, leaves: list[Expr]) -> None:
        self.graph = graph
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
                return self._tensor(self._value(node.args[0]))
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

    def _tensor(self, value: Any) -> Expr:
        """A captured tensor that is used without an index is 0-d."""
        if isinstance(value, View):
            raise Untraceable(f"a vector of {len(value.left)} dimensions inside a function")
        return make("gather", value) if isinstance(value, Expr) and value.kind == "capture" else value

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
            return view if view.left else _entry(view.source, *(i for i in view.indices if i is not None))
        if example.dim() != 0:
            raise Untraceable(f"{name} with a result of {example.dim()} dimensions, not a number,")
        args = tuple(self._tensor(a) for a in args)
        _check_integers(name, node)
        try:
            if name in SPECIAL:
                return _typed(name, SPECIAL[name](example, *args, **kwargs), example)
            if name in DIRECT and not kwargs:
                return _typed(name, make(DIRECT[name], *numbers(args)), example)
        except (TypeError, AttributeError) as error:  # arguments that neither the row nor the reader of this op takes
            raise Untraceable(f"{name} ({error})") from error
        raise Untraceable(name)


def _example(arg: Any) -> torch.Tensor:
    return arg.meta["val"]


DO_NOT_WRAP = (
    "index", "select", "where", "clone", "detach", "alias", "view", "contiguous", "lift_fresh_copy",
    "bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__",
)  # fmt: skip


def _entry(captured: Expr, *indices: Expr) -> Expr:
    """An entry of a captured tensor, or of the `stop` of one."""
    if captured.kind == "stop":
        return make("stop", make("gather", captured.args[0], *indices))
    return make("gather", captured, *indices)


def _stop(root: Expr) -> Expr:
    """`root` without gradients: every leaf of it that may have one is in a `stop`, and nothing else ever is."""
    leaves = [n for n in ir.walk(root) if n is SCORE or (n.kind == "gather" and n.dtype == F32)]
    stopped = {n: n for n in ir.walk(root) if n.kind == "stop"}
    return ir.rebuild(root, {n: make("stop", n) for n in leaves} | stopped)


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


def _typed(name: str, result: Expr, example: torch.Tensor) -> Expr:
    """`result` in the dtype that torch gives it, which the op table may not know: bool + 1 is an int64."""
    dtype = dtype_of(example.dtype)
    if result.dtype != dtype and (F32 in (result.dtype, dtype) or result.dtype == I64):
        raise Untraceable(f"{name} with a result of {example.dtype}")
    return ir.cast(result, dtype)


DIRECT = {aten: row.name for row in ROWS for aten in (row.aten or (row.name,))}
NOT_DIRECT = (
    "gather", "sign", "bool", F32, I32, I64, "clamp_min", "clamp_max", "relu_grad", "pow", "gelu", "softplus",
    "bitand", "bitor", "bitxor", "lshift",
)  # fmt: skip
for _name in NOT_DIRECT:
    DIRECT.pop(_name, None)
DIRECT["sign"] = DIRECT["sgn"] = "sign"


def numbers(args: Sequence[Any]) -> list[Expr]:
    """Python numbers take the dtype of the tensors beside them, as torch's promotion has it."""
    if not all(isinstance(a, (Expr, int, float)) for a in args):
        raise Untraceable("an argument that is neither a tensor nor a number")
    common = ir.promote(*(a.dtype for a in args if isinstance(a, Expr)))
    return [a if isinstance(a, Expr) else ir.const(a, _number_dtype(a, common)) for a in args]


def _number_dtype(number: float, common: str) -> str:
    if isinstance(number, float):
        return F32
    if isinstance(number, bool):
        return BOOL
    return I64 if common == BOOL else common


def _with_alpha(name: str) -> Callable[..., Expr]:
    def read(example: Any, a: Any, b: Any, *, alpha: float = 1) -> Expr:
        left, right = numbers((a, b))
        return make(name, left, right if alpha == 1 else right * ir.const(alpha, right.dtype))

    return read


def _rsub(example: Any, a: Any, b: Any, alpha: float = 1) -> Expr:
    if alpha != 1:
        raise Untraceable("rsub with alpha")
    left, right = numbers((a, b))
    return make("sub", right, left)


def _bitwise(of_truths: str, of_integers: str) -> Callable[..., Expr]:
    def read(example: Any, a: Any, b: Any) -> Expr:
        return make(of_truths if example.dtype == torch.bool else of_integers, *numbers((a, b)))

    return read


def _xor(example: Any, a: Any, b: Any) -> Expr:
    return make("ne", *(ir.cast(ir.cast(x, BOOL), I32) for x in numbers((a, b))))


def _bitwise_xor(example: Any, a: Any, b: Any) -> Expr:
    return _xor(example, a, b) if example.dtype == torch.bool else make("bitxor", *numbers((a, b)))


def _bitwise_not(example: Any, x: Expr) -> Expr:
    """~x -> -x - 1 on integers"""
    return make("not", x) if example.dtype == torch.bool else -x - 1


WIDTH = {I32: 32, I64: 64}


def _shift_left(example: Any, x: Any, count: Any) -> Expr:
    """x << n -> where(0 <= n < width, x << n, 0): no op is given another count"""
    x, count, width = _shifted(example, x, count)
    zero = ir.const(0, x.dtype)
    within = make("and", make("ge", count, zero), make("lt", count, ir.const(width, x.dtype)))
    return make("where", within, make("lshift", x, _between(count, width - 1)), zero)


def _shift_right(example: Any, x: Any, count: Any) -> Expr:
    """x >> n -> x // 2 ** n, rounded down; by the width or more, and by a negative count, it leaves the sign alone"""
    x, count, width = _shifted(example, x, count)
    zero, one, most = (ir.const(n, x.dtype) for n in (0, 1, width - 2))
    within = make("and", make("ge", count, zero), make("le", count, most))
    sign = make("where", make("lt", x, zero), ir.const(-1, x.dtype), zero)
    return make("where", within, make("idiv", x, make("lshift", one, _between(count, width - 2))), sign)


def _shifted(example: Any, x: Any, count: Any) -> tuple[Expr, Expr, int]:
    dtype = dtype_of(example.dtype)
    x, count = (ir.cast(n, dtype) for n in numbers((x, count)))
    return x, count, WIDTH[dtype]


def _between(count: Expr, most: int) -> Expr:
    return make("min", make("max", count, ir.const(0, count.dtype)), ir.const(most, count.dtype))


def _clamp(example: Any, x: Expr, low: Any = None, high: Any = None, *, min: Any = None, max: Any = None) -> Expr:
    low, high = (min if low is None else low), (max if high is None else high)
    for name, bound in (("clamp_min", low), ("clamp_max", high)):
        if bound is not None:
            if isinstance(bound, Expr) and ir.depends_on(bound, SCORE):
                raise Untraceable("clamp to a bound that depends on the score")
            x = make(name, *numbers((x, bound)))
    return x


def _pow(example: Any, x: Any, exponent: Any) -> Expr:
    if not isinstance(exponent, (int, float)) or dtype_of(example.dtype) != F32:
        raise Untraceable("pow with an exponent that is no number, or of integers")
    return make("pow", x, ir.const(float(exponent), F32))


def _gelu(example: Any, x: Expr, *, approximate: str = "none") -> Expr:
    return make("gelu" if approximate == "none" else "gelu_tanh", x)


def _softplus(example: Any, x: Expr, beta: float = 1, threshold: float = 20) -> Expr:
    if (beta, threshold) != (1, 20):
        raise Untraceable("softplus with another beta or threshold")
    return make("softplus", x)


def _div(example: Any, a: Any, b: Any, *, rounding_mode: str | None = None) -> Expr:
    if rounding_mode is None:
        return make("div", *numbers((a, b)))
    if rounding_mode != "floor" or dtype_of(example.dtype) == F32:
        raise Untraceable(f"div with rounding_mode {rounding_mode!r}")
    return make("idiv", *numbers((a, b)))


def _cast(example: Any, x: Any, *args: Any, **kwargs: Any) -> Expr:
    dtype = dtype_of(example.dtype)
    if example.dtype in HALVES:
        if x.kind != "const":
            raise Untraceable(f"a cast to {example.dtype}")
        return ir.const(_rounded(x.value, example.dtype), F32)
    if dtype in (I32, I64) and x.dtype == F32:
        raise Untraceable("a cast from float to integer")
    return ir.cast(x, dtype)


def _same(example: Any, x: Expr, *args: Any, **kwargs: Any) -> Expr:
    return x


def _filled(fill: float | None) -> Callable[..., Expr]:
    """full, zeros, ones and their new_ and _like kinds: `fill`, or the last positional argument."""

    def read(example: Any, *args: Any, **kwargs: Any) -> Expr:
        number = args[-1] if fill is None else fill
        return ir.const(_rounded(number, example.dtype), dtype_of(example.dtype))

    return read


def _rounded(number: Any, dtype: torch.dtype) -> float:
    """The number as a tensor of this dtype holds it."""
    return torch.tensor(number, dtype=dtype).item()


def _where(example: Any, condition: Expr, x: Any, y: Any) -> Expr:
    if not any(isinstance(v, Expr) for v in (x, y)):
        return make("where", condition, *(ir.const(v, dtype_of(example.dtype)) for v in (x, y)))
    return make("where", condition, *numbers((x, y)))


def _masked_fill(example: Any, x: Expr, condition: Expr, value: Any) -> Expr:
    return make("where", condition, *reversed(numbers((x, value))))


SPECIAL: dict[str, Callable[..., Expr]] = {
    "add": _with_alpha("add"), "sub": _with_alpha("sub"), "rsub": _rsub, "div": _div, "pow": _pow,
    "bitwise_and": _bitwise("and", "bitand"), "__and__": _bitwise("and", "bitand"),
    "bitwise_or": _bitwise("or", "bitor"), "__or__": _bitwise("or", "bitor"), "bitwise_not": _bitwise_not,
    "bitwise_xor": _bitwise_xor, "__xor__": _bitwise_xor, "logical_xor": _xor,
    "bitwise_left_shift": _shift_left, "__lshift__": _shift_left,
    "bitwise_right_shift": _shift_right, "__rshift__": _shift_right,
    "clamp": _clamp, "gelu": _gelu, "softplus": _softplus,
    "clamp_min": lambda e, x, low: _clamp(e, x, low), "clamp_max": lambda e, x, high: _clamp(e, x, None, high),
    "square": lambda e, x: make("mul", x, x), "where": _where, "masked_fill": _masked_fill,
    "_to_copy": _cast, "clone": _same, "detach": lambda e, x: _stop(x), "alias": _same, "lift_fresh_copy": _same,
    "view": _same, "contiguous": _same, "scalar_tensor": _filled(None), "full": _filled(None),
    "new_full": _filled(None), "full_like": _filled(None), "zeros": _filled(0), "new_zeros": _filled(0),
    "zeros_like": _filled(0), "ones": _filled(1), "new_ones": _filled(1), "ones_like": _filled(1),
}  # fmt: skip
