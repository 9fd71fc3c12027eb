"""Range analysis of integer expressions: which can never be negative, and how large they can get.

It rests on two facts: no axis is longer than AXIS_LIMIT, and no scalar or operand is beyond VALUE_LIMIT. The op checks
the axes and the scalars when it runs. (A captured limit beyond VALUE_LIMIT means "no bound"; partition.py clamps it.
Within a sum, 32-bit numbers of that size overflow in torch already.) No op has a case here: its row in the op table has
its interval, and an op without one may give any integer.
"""

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interval_rules import UNBOUNDED, Interval
from cudnn_flex_compile.scoremod.ir import BOOL, F32, I32, I64, Expr
from cudnn_flex_compile.scoremod.optable import TABLE

AXIS_LIMIT = 2**24
VALUE_LIMIT = 2**28  # a bound adds several
INT32_LIMIT = 2**31 - 1


def nonnegative(node: Expr) -> bool:
    """True only where no value of the leaves makes the integer expression negative."""
    return interval(node)[0] >= 0


def interval(root: Expr, longest: int = AXIS_LIMIT) -> Interval:
    """Bounds of the value of an integer or boolean expression that does not overflow. No axis is longer than `longest`.
    """
    return _intervals(root, UNBOUNDED[1], longest)[root]


def magnitude(root: Expr, captured: int = INT32_LIMIT + 1, longest: int = AXIS_LIMIT) -> int:
    """An upper bound of |value| of an integer or boolean expression, at every step of its evaluation.

    `captured` bounds the entries of captured tensors, and `longest` the axes. The index into a captured tensor is no
    step: it is in its range.
    """
    largest: dict[Expr, int] = {}
    for node, (low, high) in _intervals(root, captured, longest).items():
        steps = () if node.kind == "gather" else node.args
        own = 0 if node.dtype == F32 else max(-low, high)
        largest[node] = max([own, *(largest[a] for a in steps)])
    return largest[root]


def _intervals(root: Expr, captured: int, longest: int) -> dict[Expr, Interval]:
    """Bounds of every node, arguments before their users; those of floats are UNBOUNDED."""
    found: dict[Expr, Interval] = {}
    for node in ir.walk(root):
        low, high = _leaf(node, captured, longest) if _is_leaf(node) else _result(node, [found[a] for a in node.args])
        found[node] = max(low, UNBOUNDED[0]), min(high, UNBOUNDED[1])
    return found


def _is_leaf(node: Expr) -> bool:
    return not node.args or node.kind == "gather" or node.dtype in (BOOL, F32)


def _leaf(node: Expr, captured: int, longest: int) -> Interval:
    if node.dtype == BOOL:
        return 0, 1
    if node.dtype == F32:
        return UNBOUNDED
    match node.kind:
        case "const":
            return int(node.value or 0), int(node.value or 0)
        case "index":
            return 0, longest - 1
        case "scalar" | "operand":
            return -VALUE_LIMIT, VALUE_LIMIT
        case _:
            return -captured, captured


def _result(node: Expr, args: list[Interval]) -> Interval:
    rule = TABLE[node.kind].interval
    return UNBOUNDED if rule is None else rule(*args)


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
