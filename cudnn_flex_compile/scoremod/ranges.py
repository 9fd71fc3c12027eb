"""Range analysis of integer expressions: which can never be negative, and how large they can get.

Knows only the meaning of the integer ops, and that no axis is longer than AXIS_LIMIT and no scalar or operand
is beyond VALUE_LIMIT; the op checks the former and the scalars when it runs. (A captured limit beyond VALUE_LIMIT
means "no bound"; partition.py clamps it. Within a sum, 32-bit numbers of that size overflow in torch already.)
"""

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import BOOL, I32, I64, Expr

AXIS_LIMIT = 2**24
VALUE_LIMIT = 2**28  # a bound adds several
INT32_LIMIT = 2**31 - 1


def nonnegative(node: Expr) -> bool:
    """True only where no value of the leaves makes the expression negative."""
    match node.kind:
        case "index" | "abs":
            return True
        case "const":
            return int(node.value or 0) >= 0
        case "add" | "mul" | "idiv" | "min":
            return all(nonnegative(a) for a in node.args)
        case "max":
            return any(nonnegative(a) for a in node.args)
        case "mod":
            return nonnegative(node.args[1])
        case "i32" | "i64":
            return node.args[0].dtype == BOOL or nonnegative(node.args[0])
        case _:
            return False


def magnitude(root: Expr) -> int:
    """An upper bound of |value| of an integer or boolean expression, at every step of its evaluation."""
    largest: dict[Expr, int] = {}
    for node in ir.walk(root):
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
