"""Rewrites an expression into the forms that cuDNN's score_mod dialect computes right.

The strategies of engine/graph call it before they write nodes; it does not import cuDNN's Python package. Each rule
names its reason. The result has the same value but for float rounding; `Illegal` names the op that has no legal form.
"""

import math
from collections.abc import Callable

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.integers import Illegal, extremum, quotient, remainder
from cudnn_flex_compile.scoremod.interpret import fold
from cudnn_flex_compile.scoremod.ir import BOOL, F32, I32, I64, SCORE, TRUE, Expr
from cudnn_flex_compile.scoremod.optable import TABLE, make
from cudnn_flex_compile.scoremod.simplify import simplify
from cudnn_flex_compile.scoremod.switches import on

TINY = 1e-30
GIVEN = ("operand", "scalar")


def _of_score(node: Expr) -> bool:
    return ir.depends_on(node, SCORE)


def _scalar(node: Expr) -> bool:
    return node.kind in ("const", "scalar")


def _sub(n: Expr) -> Expr:
    """c - x -> x * -1 + c: a scalar as the left operand of a subtraction is refused in the backward"""
    left, right = n.args
    if not _scalar(left) or not on("scalar right"):
        return n
    return right * ir.const(-1, right.dtype) + left


def _div(n: Expr) -> Expr:
    """c / x -> reciprocal(x) * c: scalars are right operands"""
    left, right = n.args
    return make("reciprocal", right) * left if _scalar(left) and on("scalar right") else n


def _neg(n: Expr) -> Expr:
    """-x -> x * -1: neg is a float op in cuDNN, and cannot be the first op on the backward's gradient"""
    return n.args[0] * ir.const(-1, n.dtype)


def _max(n: Expr) -> Expr:
    """max(x, y) -> x + relu(y - x): max with a relu_backward beside it gives a wrong dV

    Here x is the argument that depends on the score: a bound y that is far from every score leaves it as it is. An x
    that may be infinite takes the other place: relu(x - y) + y.
    """
    if not _of_score(n) or not on("max by relu"):
        return extremum(n) if n.dtype == I32 else n
    x, y = sorted(n.args, key=_of_score, reverse=True)
    return make("relu", x - y) + y if _infinite(x, y) else x + make("relu", y - x)


def _min(n: Expr) -> Expr:
    """min(x, y) -> x - relu(x - y)"""
    if not _of_score(n) or not on("max by relu"):
        return extremum(n) if n.dtype == I32 else n
    x, y = sorted(n.args, key=_of_score, reverse=True)
    return make("relu", y - x) * -1.0 + y if _infinite(x, y) else x - make("relu", x - y)


def _infinite(x: Expr, y: Expr) -> bool:
    """Whether x may be infinite, by a constant or by a captured tensor (a bias of -inf), while y reads none."""
    if any(isinstance(n.value, float) and math.isinf(n.value) for n in ir.walk(x)):
        return True
    of_x, of_y = (any(n.kind == "operand" and n.dtype == F32 for n in ir.walk(side)) for side in (x, y))
    return of_x and not of_y


def _clamp(kind: str) -> Callable[[Expr], Expr]:
    def rewrite(n: Expr) -> Expr:
        rule = _max if kind == "max" else _min
        return rule(n) if _of_score(n) and on("max by relu") else ir.intern(kind, n.dtype, n.args)

    return rewrite


def _abs(n: Expr) -> Expr:
    """|x| of an integer -> extremum"""
    return extremum(n) if n.dtype == I32 else n


def _exp2(n: Expr) -> Expr:
    """exp2(x) -> exp(x * log(2))"""
    return make("exp", n.args[0] * math.log(2))


def _sign(n: Expr) -> Expr:
    """sign(x) -> x / (|x| + tiny): comparing the saved score with a scalar is refused in the backward"""
    (x,) = n.args
    return x / (make("abs", x) + TINY)


def _strict(n: Expr) -> Expr:
    """a > b -> a - 1 >= b on integers: a strict bound between indices is computed as a non-strict one

    operand > b -> operand >= b + 1: nodes of operands alone are refused, and an operand may be the least integer
    """
    left, right = n.args
    if left.dtype != I32:
        return n
    if left.kind in GIVEN:
        return make("ge", left, right + ir.const(1, I32))
    return make("ge", left + ir.const(-1, I32), right)


def _operand_right(n: Expr) -> Expr:
    """operand >= x -> x <= operand: an operand must be the right side of a comparison"""
    left, right = n.args
    turned = {"ge": "le", "gt": "lt", "eq": "eq", "ne": "ne"}
    given = [side.kind in (*GIVEN, "const") for side in n.args]
    if not on("operand right"):
        return n
    return make(turned[n.kind], right, left) if given == [True, False] else n


def _number_of_bool(n: Expr) -> Expr:
    """f32(p) -> where(p, 1, 0) for a bool p"""
    (x,) = n.args
    if x.dtype != BOOL:
        return n
    return make("where", x, ir.const(1, n.dtype), ir.const(0, n.dtype))


def _where(n: Expr) -> Expr:
    """where(p, c, y) -> where(~p, y, c); where(p, c, d) -> where(p, q * 0 + c, d): the first choice is no scalar"""
    condition, x, y = n.args
    if not _scalar(x):
        return n
    if not _scalar(y):
        otherwise = simplify(make("not", condition))
        return y if otherwise is TRUE else make("where", otherwise, y, x)
    zero = ir.cast(ir.intern("mul", I32, (ir.index("q"), ir.const(0, I32))), n.dtype)
    return make("where", condition, ir.intern("add", n.dtype, (zero, x)), y)


def _compare(n: Expr) -> Expr:
    """p == r -> p & r | ~p & ~r for predicates: cuDNN compares 32-bit integers alone"""
    if _of_score(n):
        raise Illegal(n.kind, "a comparison of the score selects between branches, which cuDNN refuses")
    if n.args[0].dtype == BOOL and n.kind in ("eq", "ne"):
        left, right = n.args
        opposite = simplify(make("not", right))
        same = (right, opposite) if n.kind == "eq" else (opposite, right)
        return simplify(make("or", make("and", left, same[0]), make("and", make("not", left), same[1])))
    if n.args[0].dtype != I32:
        raise Illegal(n.kind, "cuDNN compares 32-bit integers alone")
    if n.kind == "gt" and all(a.kind in GIVEN for a in n.args):
        return make("not", make("ge", *reversed(n.args)))
    return _turned(_operand_right(_strict(n) if n.kind == "gt" else n))


def _turned(n: Expr) -> Expr:
    """kv >= q -> kv + 0 >= q: cuDNN mistakes the plain comparison for the causal q >= kv"""
    left, right = n.args
    if n.kind != "ge" or left is not ir.index("k") or right is not ir.index("q") or not on("diagonal turned"):
        return n
    return ir.intern("ge", BOOL, (ir.intern("add", I32, (left, ir.const(0, I32))), right))


def _stop(n: Expr) -> Expr:
    """stop(x) -> x: the backward has been derived by now, and a kernel only computes values"""
    return n.args[0]


RULES: dict[str, Callable[[Expr], Expr]] = {
    "stop": _stop,
    "sub": _sub, "div": _div, "neg": _neg, "abs": _abs, "max": _max, "min": _min, "sign": _sign, "exp2": _exp2,
    "clamp_min": _clamp("max"), "clamp_max": _clamp("min"), "idiv": quotient, "mod": remainder,
    "f32": _number_of_bool, "i32": _number_of_bool, "where": _where,
    "ge": _compare, "gt": _compare, "eq": _compare, "ne": _compare,
}  # fmt: skip


def legalize(root: Expr) -> Expr:
    """`root` in legal forms. Raises Illegal.

    It ends, because no rule returns the kind of node that it takes, but in a form that it leaves alone.
    """
    done: dict[Expr, Expr] = {}
    for node in ir.walk(root):
        if node.dtype == I64:
            raise Illegal(node.kind, "64-bit integers cannot be computed inside the kernel")
        args = tuple(done[a] for a in node.args)
        current = ir.intern(node.kind, node.dtype, args, node.value, node.dims) if args else node
        if args and all(a.kind == "const" for a in args):
            done[node] = fold(current)
            continue
        rule = RULES.get(current.kind)
        after = rule(current) if rule else current
        done[node] = current if after is current else legalize(after)
    return done[root]


def unsupported(root: Expr) -> str | None:
    """The first op of a legal expression that has no cuDNN method and is no cast."""
    for node in ir.walk(root):
        row = TABLE.get(node.kind)
        if row is not None and row.cudnn is None and node.kind not in (F32, I32):
            return node.kind
    return None


def computes(root: Expr) -> bool:
    """Whether the kernel can compute an expression: it has a legal form, in which every node descends from the score or
    an index. (cuDNN refuses a node that is fed by operands alone.)
    """
    try:
        legal = legalize(root)
    except Illegal:
        return False
    descends: dict[Expr, bool] = {}
    for node in ir.walk(legal):
        descends[node] = node.kind in ("score", "index") or any(descends[a] for a in node.args)
        if node.args and not descends[node]:
            return False
    return unsupported(legal) is None and (legal.kind != "const" or legal.dtype != BOOL)
