"""Range analysis of integer expressions: which can never be negative, and how large they can get.

Knows only the meaning of the integer ops, and that no axis is longer than AXIS_LIMIT and no scalar or operand
is beyond VALUE_LIMIT; the op checks the former and the scalars when it runs. (A captured limit beyond VALUE_LIMIT
means "no bound"; partition.py clamps it. Within a sum, 32-bit numbers of that size overflow in torch already.)
"""

from collections.abc import Callable

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import BOOL, I32, I64, Expr

AXIS_LIMIT = 2**24
VALUE_LIMIT = 2**28  # a bound adds several
INT32_LIMIT = 2**31 - 1


def nonnegative(node: Expr) -> bool:
    """True only where no value of the leaves makes the integer expression negative."""
    return interval(node)[0] >= 0


def interval(root: Expr) -> tuple[int, int]:
    """Bounds of the value of an integer or boolean expression that does not overflow."""
    found: dict[Expr, tuple[int, int]] = {}
    for node in ir.walk(root):
        found[node] = _interval(node, [found[a] for a in node.args])
    return found[root]


def _interval(node: Expr, args: list[tuple[int, int]]) -> tuple[int, int]:
    value = node.value
    if node.dtype == BOOL:
        return 0, 1
    if node.kind == "const" and isinstance(value, int):
        return value, value
    match node.kind:
        case "index":
            return 0, AXIS_LIMIT - 1
        case "scalar" | "operand":
            return -VALUE_LIMIT, VALUE_LIMIT
        case "i32" | "i64" if node.args[0].dtype != ir.F32:
            return args[0]
        case "neg":
            return -args[0][1], -args[0][0]
        case "abs":
            low, high = args[0]
            return max(0, low, -high), max(-low, high)
        case "where":
            return min(args[1][0], args[2][0]), max(args[1][1], args[2][1])
        case _ if node.kind in ENDS and node.dtype != ir.F32:
            ends = [ENDS[node.kind](x, y) for x in args[0] for y in args[1]]
            return min(ends), max(ends)
        case "idiv" | "mod" if args[1][0] > 0:
            (low, high), (least, most) = args
            if node.kind == "mod":
                return 0, min(high, most - 1) if low >= 0 else most - 1
            return min(low // least, low // most), max(high // least, high // most)
        case _:
            return -(2**63), 2**63


ENDS: dict[str, Callable[[int, int], int]] = {  # monotone in each argument, so that extremes are at the ends
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "min": min, "max": max,
    "clamp_min": max, "clamp_max": min,
}  # fmt: skip


def magnitude(root: Expr, captured: int = INT32_LIMIT + 1) -> int:
    """An upper bound of |value| of an integer or boolean expression, at every step of its evaluation.

    `captured` bounds what captured tensors hold.
    """
    largest: dict[Expr, int] = {}
    for node in ir.walk(root):
        if node.kind in ("gather", "capture"):  # the index into a captured tensor is in its range
            largest[node] = 1 if node.dtype == BOOL else captured
        else:
            largest[node] = max([_own(node, largest), *(largest[a] for a in node.args)])
    return largest[root]


def _own(node: Expr, largest: dict[Expr, int]) -> int:
    args = [largest[a] for a in node.args]
    match node.kind:
        case "const":
            return abs(int(node.value or 0)) if node.dtype in (I32, I64) else 1
        case "index":
            return AXIS_LIMIT
        case "add" | "sub":
            return args[0] + args[1]
        case "mul":
            return args[0] * args[1]
        case "scalar" | "operand":
            return VALUE_LIMIT
        case _ if node.dtype == BOOL:
            return 1
        case _ if args:
            return max(args)
        case _:
            return INT32_LIMIT + 1


def narrow(root: Expr) -> Expr:
    """The same value with 32-bit integers wherever 64-bit ones provably stay in their range."""
    done: dict[Expr, Expr] = {}
    for node in ir.walk(root):
        args = tuple(done[a] for a in node.args)
        done[node] = _narrowed(node, args)
    return done[root]


def _narrowed(node: Expr, args: tuple[Expr, ...]) -> Expr:
    if node.kind == "const" and node.dtype == I64 and abs(int(node.value or 0)) <= INT32_LIMIT:
        return ir.const(int(node.value or 0), I32)
    if not args:
        return node
    if node.kind == "i64" and args[0].dtype in (I32, BOOL):
        return ir.cast(args[0], I32)
    if node.kind == "i32" and args[0].dtype == I32:
        return args[0]
    if node.kind == "gather":
        return ir.intern(node.kind, node.dtype, args)
    wide = any(a.dtype == I64 for a in args)
    if node.dtype == I64 and not wide:
        small = ir.intern(node.kind, I32, args)
        if magnitude(small) <= INT32_LIMIT:
            return small
    if wide or node.dtype == I64:  # the arguments of one op have one dtype
        args = tuple(ir.cast(a, I64) if a.dtype == I32 else a for a in args)
    return ir.intern(node.kind, node.dtype, args, node.value, node.dims)
