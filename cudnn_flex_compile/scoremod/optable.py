"""The op table: one row for each op, with everything that any part of the compiler needs to know about it.

A row names the pointwise method that implements the op in cuDNN; the table does not import cuDNN's Python package.
A test walks the table: every row has an evaluation and a signature, every float row a derivative or a
reason why it has none, every row of integers an interval, and every row either a cuDNN method, a legal form
(legalize.py), or a reason to be computed outside the kernel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.scoremod import interval_rules as bounds
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import BOOL, F32, I32, I64, Expr, cast, promote

Partials = tuple[Expr | None, ...]
Backward = Callable[[Expr, tuple[Expr, ...], Expr], Partials]


@dataclass(frozen=True, slots=True)
class Row:
    """name: the op in text and IR.
    signature: how arguments are typed. "float": F32 -> F32. "number": promoted -> the same. "compare":
        promoted -> BOOL. "logic": BOOL -> BOOL. "integer": promoted integers -> the same. "where":
        BOOL, promoted, promoted -> the same. A dtype name: any -> that dtype (casts).
    arity: number of arguments.
    evaluate: the meaning, on torch tensors that broadcast and have the promoted dtype.
    backward: (gradient, args, result) -> the gradient of each argument, None for a zero one.
    interval: (low, high) of each integer argument -> (low, high) of the exact integer result; None: any integer.
    cudnn: the pygraph method, or None where legalize.py rewrites the op before lowering.
    slots: that method's keywords, one per argument.
    infix: how people write it; {0}, {1}, {2} are the arguments.
    aten: the ATen ops that mean the same with the same arguments; without any, the one of the same name.
    """

    name: str
    signature: str
    arity: int
    evaluate: Callable[..., torch.Tensor]
    backward: Backward | None = None
    cudnn: str | None = None
    slots: tuple[str, ...] = ()
    infix: str = ""
    aten: tuple[str, ...] = ()
    interval: bounds.Rule | None = None


def _zero(g: Expr, args: tuple[Expr, ...], out: Expr) -> Partials:
    return (None,) * len(args)


def _mul_backward(g: Expr, args: tuple[Expr, ...], out: Expr) -> Partials:
    return g * args[1], g * args[0]


def _abs_backward(g: Expr, args: tuple[Expr, ...], out: Expr) -> Partials:
    return (g * make("sign", args[0]),)


def _where_backward(g: Expr, args: tuple[Expr, ...], out: Expr) -> Partials:
    zero = ir.const(0.0, F32)
    return None, make("where", args[0], g, zero), make("where", args[0], zero, g)


def _tie_backward(g: Expr, ahead: Expr, behind: Expr) -> Expr:
    """The gradient of `ahead` in max(ahead, behind): g where ahead > behind, g / 2 at a tie (torch's convention)."""
    wins = make("relu_grad", g, ahead - behind)
    loses = make("relu_grad", g, behind - ahead)
    return (g + wins - loses) * 0.5


def _min_backward(g: Expr, args: tuple[Expr, ...], out: Expr) -> Partials:
    return _tie_backward(g, args[1], args[0]), _tie_backward(g, args[0], args[1])


def _max_backward(g: Expr, args: tuple[Expr, ...], out: Expr) -> Partials:
    return _tie_backward(g, args[0], args[1]), _tie_backward(g, args[1], args[0])


def _passes_at_bound() -> bool:
    """Whether torch's clamp passes its gradient at the bound itself: torch 2.13 does, 2.15 does not."""
    with torch.inference_mode(False), torch.enable_grad(), torch_private.without_modes():
        x = torch.zeros((), requires_grad=True, device="cpu")
        return bool(torch.autograd.grad(x.clamp(min=0.0), x)[0])


PASSES_AT_BOUND = _passes_at_bound()


def _clamp_backward(g: Expr, ahead: Expr, behind: Expr, bound: Expr) -> Expr:
    """g where ahead > behind. At a tie it is g in some versions of torch; in others 0 for a number as the bound, and
    g / 2 for a tensor.
    """
    if PASSES_AT_BOUND:
        return g - make("relu_grad", g, behind - ahead)
    number = bound.kind in ("const", "scalar")
    return make("relu_grad", g, ahead - behind) if number else _tie_backward(g, ahead, behind)


def _clamp_min_backward(g: Expr, args: tuple[Expr, ...], out: Expr) -> Partials:
    return _clamp_backward(g, args[0], args[1], args[1]), None


def _clamp_max_backward(g: Expr, args: tuple[Expr, ...], out: Expr) -> Partials:
    return _clamp_backward(g, args[1], args[0], args[1]), None


def _pow_backward(g: Expr, args: tuple[Expr, ...], out: Expr) -> Partials:
    """g * (x ** (n - 1) * n); zero for n = 0, also where x ** -1 is infinite."""
    x, n = args
    zero = n.kind == "const" and n.value == 0
    return None if zero else g * (make("pow", x, n - 1.0) * n), None


def _floor_divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.div(a, b, rounding_mode="floor")


def _softplus(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.softplus(x)


def _by_autograd(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """(g, x) -> the vector-Jacobian product of an elementwise function, as autograd gives it."""

    def evaluate(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        g, x = torch.broadcast_tensors(g, x)
        return torch.func.vjp(function, x)[1](g)[0]

    return evaluate


_gelu = torch.nn.functional.gelu
_silu = torch.nn.functional.silu


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return _gelu(x, approximate="tanh")


UNARY, BINARY, GRAD = ("input",), ("a", "b"), ("loss", "input")
COMPARE, MINMAX, CHOICE = ("input", "comparison"), ("input0", "input1"), ("mask", "input0", "input1")

ROWS: tuple[Row, ...] = (
    # arithmetic
    Row("add", "number", 2, torch.add, lambda g, a, o: (g, g), "add", BINARY, "({0} + {1})", (), bounds.sums),
    Row("sub", "number", 2, torch.sub, lambda g, a, o: (g, -g), "sub", BINARY, "({0} - {1})", (), bounds.differences),
    Row("mul", "number", 2, torch.mul, _mul_backward, "mul", BINARY, "({0} * {1})", (), bounds.products),
    Row("div", "float", 2, torch.div, lambda g, a, o: (g / a[1], -(g * o) / a[1]), "div", BINARY, "({0} / {1})"),
    Row("neg", "number", 1, torch.neg, lambda g, a, o: (-g,), infix="-{0}", interval=bounds.negatives),
    Row("abs", "number", 1, torch.abs, _abs_backward, "abs", UNARY, "|{0}|", (), bounds.absolute),
    Row("sign", "float", 1, torch.sign, _zero),
    Row("reciprocal", "float", 1, torch.reciprocal, lambda g, a, o: (-(g * o * o),), "reciprocal", UNARY),
    Row("min", "number", 2, torch.minimum, _min_backward, "min", MINMAX, "", ("minimum",), bounds.smaller),
    Row("max", "number", 2, torch.maximum, _max_backward, "max", MINMAX, "", ("maximum",), bounds.larger),
    # clamps to a bound that does not depend on the score
    Row("clamp_min", "number", 2, torch.maximum, _clamp_min_backward, interval=bounds.larger),
    Row("clamp_max", "number", 2, torch.minimum, _clamp_max_backward, interval=bounds.smaller),
    # powers and transcendental functions
    Row("exp", "float", 1, torch.exp, lambda g, a, o: (g * o,), "exp", UNARY),
    Row("exp2", "float", 1, torch.exp2, lambda g, a, o: (g * o * math.log(2),)),
    Row("log", "float", 1, torch.log, lambda g, a, o: (g / a[0],), "log", UNARY),
    Row("sqrt", "float", 1, torch.sqrt, lambda g, a, o: (g / o * 0.5,), "sqrt", UNARY),
    Row("rsqrt", "float", 1, torch.rsqrt, lambda g, a, o: (g * (o * o * o) * -0.5,), "rsqrt", UNARY),
    Row("pow", "float", 2, torch.pow, _pow_backward, "pow", MINMAX, "({0} ** {1})"),
    Row("sin", "float", 1, torch.sin, lambda g, a, o: (g * make("cos", a[0]),), "sin", UNARY),
    Row("cos", "float", 1, torch.cos, lambda g, a, o: (-(g * make("sin", a[0])),), "cos", UNARY),
    Row("tan", "float", 1, torch.tan, lambda g, a, o: (g + g * o * o,), "tan", UNARY),
    Row("tanh", "float", 1, torch.tanh, lambda g, a, o: (g - g * o * o,), "tanh", UNARY),
    Row("sigmoid", "float", 1, torch.sigmoid, lambda g, a, o: (g * (o - o * o),), "sigmoid", UNARY),
    Row(
        "erf",
        "float",
        1,
        torch.erf,
        lambda g, a, o: (g * (make("exp", -(a[0] * a[0])) * (2 / math.sqrt(math.pi))),),
        "erf",
        UNARY,
    ),
    # activations
    Row("relu", "float", 1, torch.relu, lambda g, a, o: (make("relu_grad", g, a[0]),), "relu", UNARY),
    Row("gelu", "float", 1, _gelu, lambda g, a, o: (make("gelu_grad", g, a[0]),), "gelu", UNARY),
    Row(
        "gelu_tanh",
        "float",
        1,
        _gelu_tanh,
        lambda g, a, o: (make("gelu_tanh_grad", g, a[0]),),
        "gelu_approx_tanh",
        UNARY,
    ),
    Row("silu", "float", 1, _silu, lambda g, a, o: (make("silu_grad", g, a[0]),), "swish", UNARY),
    Row("softplus", "float", 1, _softplus, lambda g, a, o: (g * make("sigmoid", a[0]),), "softplus", UNARY),
    # their vector-Jacobian products; second derivatives are never asked for
    Row("relu_grad", "float", 2, lambda g, x: torch.where(x > 0, g, 0.0), None, "relu_backward", GRAD),
    Row("gelu_grad", "float", 2, _by_autograd(_gelu), None, "gelu_backward", GRAD),
    Row("gelu_tanh_grad", "float", 2, _by_autograd(_gelu_tanh), None, "gelu_approx_tanh_backward", GRAD),
    Row("silu_grad", "float", 2, _by_autograd(_silu), None, "swish_backward", GRAD),
    # steps
    Row("floor", "float", 1, torch.floor, _zero, "floor", UNARY),
    Row("ceil", "float", 1, torch.ceil, _zero, "ceil", UNARY),
    # integers
    Row("idiv", "integer", 2, _floor_divide, None, "div", BINARY, "({0} // {1})", ("floor_divide",), bounds.quotient),
    Row("mod", "integer", 2, torch.remainder, None, "mod", MINMAX, "({0} % {1})", ("remainder",), bounds.remainder),
    # bits, which cuDNN does not compute; shifts to the right are divisions (trace.py)
    Row("bitand", "integer", 2, torch.bitwise_and, infix="({0} & {1})", interval=bounds.bits_in_both),
    Row("bitor", "integer", 2, torch.bitwise_or, infix="({0} | {1})", interval=bounds.bits_in_either),
    Row("bitxor", "integer", 2, torch.bitwise_xor, infix="({0} ^ {1})", interval=bounds.bits_in_one),
    Row("lshift", "integer", 2, torch.bitwise_left_shift, infix="({0} << {1})", interval=bounds.shifted_left),
    # predicates
    Row("ge", "compare", 2, torch.ge, None, "cmp_ge", COMPARE, "({0} >= {1})"),
    Row("gt", "compare", 2, torch.gt, None, "cmp_gt", COMPARE, "({0} > {1})"),
    Row("le", "compare", 2, torch.le, None, "cmp_le", COMPARE, "({0} <= {1})"),
    Row("lt", "compare", 2, torch.lt, None, "cmp_lt", COMPARE, "({0} < {1})"),
    Row("eq", "compare", 2, torch.eq, None, "cmp_eq", COMPARE, "({0} == {1})"),
    Row("ne", "compare", 2, torch.ne, None, "cmp_neq", COMPARE, "({0} != {1})"),
    Row("and", "logic", 2, torch.logical_and, None, "logical_and", BINARY, "({0} & {1})", ("logical_and",)),
    Row("or", "logic", 2, torch.logical_or, None, "logical_or", BINARY, "({0} | {1})", ("logical_or",)),
    Row("not", "logic", 1, torch.logical_not, None, "logical_not", UNARY, "~{0}", ("logical_not",)),
    Row("where", "where", 3, torch.where, _where_backward, "binary_select", CHOICE, interval=bounds.chosen),
    # a captured tensor that takes a gradient; without effect (learned.py)
    Row("learned", "float", 1, lambda x: x, lambda g, a, o: (g,)),
    # the value alone, without a gradient (trace.py: of the score, or of an entry of a captured tensor)
    Row("stop", "float", 1, lambda x: x.detach(), _zero, aten=("detach",)),
    # casts
    Row("f32", F32, 1, lambda x: x.to(torch.float32), _zero),
    Row("i32", I32, 1, lambda x: x.to(torch.int32), _zero, interval=bounds.wrapped),
    Row("i64", I64, 1, lambda x: x.to(torch.int64), _zero, interval=bounds.same),
    Row("bool", BOOL, 1, lambda x: x != 0, _zero),
    # captured[index, ...]; the first argument is a capture
    Row("gather", "gather", -1, lambda t, *i: t[i]),
)

TABLE: dict[str, Row] = {row.name: row for row in ROWS}


def well_typed(name: str, dtype: str, args: tuple[Expr, ...]) -> bool:
    """Whether `args` and the result's `dtype` are what the row's signature says. KeyError for an unknown op."""
    row, dtypes = TABLE[name], {a.dtype for a in args}
    if not args or row.arity not in (-1, len(args)):
        return False
    match row.signature:
        case "float":
            return dtypes == {F32} == {dtype}
        case "number" | "integer":
            return dtypes == {dtype} and dtype in ((F32, I32, I64) if row.signature == "number" else (I32, I64))
        case "compare":
            return dtype == BOOL and len(dtypes) == 1
        case "logic":
            return dtypes == {BOOL} == {dtype}
        case "where":
            return args[0].dtype == BOOL and args[1].dtype == args[2].dtype == dtype
        case "gather":
            return args[0].kind == "capture" and args[0].dtype == dtype
        case cast_to:
            return dtype == cast_to


def make(name: str, *args: Expr) -> Expr:
    """The node `name(*args)`, with the casts that the row's signature asks for.

    Raises KeyError for an unknown op and TypeError for a wrong number or kind of arguments.
    """
    row = TABLE[name]
    if row.arity not in (-1, len(args)):
        raise TypeError(f"{name} takes {row.arity} arguments, got {len(args)}")
    match row.signature:
        case "float":
            return ir.intern(name, F32, tuple(cast(a, F32) for a in args))
        case "number" | "compare" | "integer":
            common = promote(*(a.dtype for a in args))
            common = I32 if common == BOOL and row.signature != "compare" else common
            if row.signature == "integer" and common == F32:
                raise TypeError(f"{name} takes integers, got {[a.dtype for a in args]}")
            result = BOOL if row.signature == "compare" else common
            return ir.intern(name, result, tuple(cast(a, common) for a in args))
        case "logic":
            return ir.intern(name, BOOL, tuple(cast(a, BOOL) for a in args))
        case "where":
            common = promote(args[1].dtype, args[2].dtype)
            chosen = (cast(a, common) for a in args[1:])
            return ir.intern(name, common, (cast(args[0], BOOL), *chosen))
        case "gather":
            return ir.intern(name, args[0].dtype, args)
        case dtype:
            return cast(args[0], dtype)
