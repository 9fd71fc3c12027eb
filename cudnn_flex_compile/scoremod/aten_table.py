"""The table of ATen ops: which expression each op of a traced function is.

An op whose arguments ATen spells as the op table does is in DIRECT, another has a reader in SPECIAL, or in OF_VECTORS
if it asks for the shape of a vector. trace.py goes through a graph, and asks for one op at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import BOOL, F32, I32, I64, SCORE, Expr
from cudnn_flex_compile.scoremod.optable import ROWS, make
from cudnn_flex_compile.scoremod.vectors import MOVES, at, product_sum, reduced


class Untraceable(Exception):
    """`op` has no row in the op table, or is used in a way that no row describes."""

    def __init__(self, op: str) -> None:
        super().__init__(f"{op} is not in the op table")
        self.op = op


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


def read(
    name: str, example: torch.Tensor, sizes: Sequence[int], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Expr:  # fmt: skip
    """The expression of one op, in the dtype of its result.

    Args:
        name: of the ATen op, without its overload.
        example: its result, a fake tensor.
        sizes: the shape of its first argument; empty for one that is no tensor.
        args, kwargs: with expressions in place of tensors.

    Raises:
        Untraceable: where the table does not have the op, or not with these arguments.
    """
    try:
        if name in OF_VECTORS:
            return _typed(name, OF_VECTORS[name](example, sizes, *args, **kwargs), example)
        if name in SPECIAL:
            return _typed(name, SPECIAL[name](example, *args, **kwargs), example)
        if name in DIRECT and not kwargs:
            return _typed(name, make(DIRECT[name], *numbers(args)), example)
    except (TypeError, AttributeError) as error:  # arguments that neither the row nor the reader of this op takes
        raise Untraceable(f"{name} ({error})") from error
    raise Untraceable(name)


def _stop(root: Expr) -> Expr:
    """`root` without gradients: every leaf of it that may have one is in a `stop`, and nothing else ever is."""
    leaves = [n for n in ir.walk(root) if n is SCORE or (n.kind == "gather" and n.dtype == F32)]
    stopped = {n: n for n in ir.walk(root) if n.kind == "stop"}
    return ir.rebuild(root, {n: make("stop", n) for n in leaves} | stopped)


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
    **dict.fromkeys((*MOVES, "clone", "alias", "lift_fresh_copy", "contiguous"), _same), "_to_copy": _cast,
    "detach": lambda e, x: _stop(x), "scalar_tensor": _filled(None), "full": _filled(None),
    "new_full": _filled(None), "full_like": _filled(None), "zeros": _filled(0), "new_zeros": _filled(0),
    "zeros_like": _filled(0), "ones": _filled(1), "new_ones": _filled(1), "ones_like": _filled(1),
}  # fmt: skip


def _reduction(name: str) -> Callable[..., Expr]:
    def read(
        example: Any, sizes: Sequence[int], x: Expr, dims: Any = None, keep: bool = False, *, dtype: Any = None
    ) -> Expr:  # fmt: skip
        over = [dims] if isinstance(dims, int) else dims
        return reduced(name, x, sizes, over, dtype_of(example.dtype))

    return read


def _product(example: Any, sizes: Sequence[int], left: Expr, right: Expr) -> Expr:
    return product_sum(left, right, sizes[-1])


def _select(example: Any, sizes: Sequence[int], x: Expr, dim: int, position: int) -> Expr:
    return at(x, sizes, {dim % len(sizes): ir.const(position % sizes[dim], I32)})


def _index(example: Any, sizes: Sequence[int], x: Expr, positions: Sequence[Any]) -> Expr:
    found = {dim: i for dim, i in enumerate(positions) if i is not None}
    if any(node.kind == "lane" for i in found.values() for node in ir.walk(i)):
        raise Untraceable("an index that is a vector")
    return at(x, sizes, found)


# Readers that get the shape of the first argument, too.
OF_VECTORS: dict[str, Callable[..., Expr]] = {
    **{name: _reduction(name) for name in ("any", "all", "sum")},
    **dict.fromkeys(("dot", "vdot", "mv", "mm", "bmm"), _product), "select": _select, "index": _index,
}  # fmt: skip
