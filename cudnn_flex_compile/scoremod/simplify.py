"""Constant folding and algebraic simplification, as rows of rules.

Every rule keeps the value for every input, NaN and infinities included. Two rules may turn -0.0 into 0.0 (x + 0,
x - 0): a score of either zero gives the same attention weights. Forms that only cuDNN needs are in legalize.py.
"""

import math
from collections.abc import Callable

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import fold
from cudnn_flex_compile.scoremod.ir import BOOL, F32, FALSE, I32, I64, TRUE, Expr, Program
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.ranges import INT32_LIMIT, interval, magnitude

Rule = Callable[[Expr], Expr | None]


def is_const(node: Expr, value: float | None = None) -> bool:
    """Whether a node is a constant, of this value if one is given."""
    return node.kind == "const" and (value is None or (node.dtype != BOOL and node.value == value))


def _unit(value: float) -> Rule:
    """x op value -> x"""
    return lambda n: n.args[0] if is_const(n.args[1], value) else None


def _integer_zero(n: Expr) -> Expr | None:
    """x * 0 -> 0, on integers only: a float x may be NaN or infinite"""
    zero = next((a for a in n.args if is_const(a, 0)), None)
    return zero if n.dtype != F32 else None


def _power_of_zero(n: Expr) -> Expr | None:
    """x ** 0 -> 1, for a NaN too"""
    return ir.const(1.0, F32) if is_const(n.args[1], 0.0) else None


def _absorbs(value: Expr) -> Rule:
    """x op value -> value"""
    return lambda n: value if value in n.args else None


def _drops(value: Expr) -> Rule:
    """x op value -> x"""
    return lambda n: next((n.args[1 - i] for i in (0, 1) if n.args[i] is value), None)


def _same(n: Expr) -> Expr | None:
    """x op x -> x"""
    return n.args[0] if n.args[0] is n.args[1] else None


OPPOSITE = {"ge": "lt", "lt": "ge", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}


def _not(n: Expr) -> Expr | None:
    """~~x -> x;  ~(a >= b) -> a < b on integers (with a NaN both are false);  ~(x & y) -> ~x | ~y"""
    (x,) = n.args
    if x.kind == "not":
        return x.args[0]
    if x.kind in OPPOSITE and (x.args[0].dtype != F32 or x.kind in ("eq", "ne")):
        return make(OPPOSITE[x.kind], *x.args)
    if x.kind in ("and", "or"):
        return make("or" if x.kind == "and" else "and", *(make("not", a) for a in x.args))
    return None


def _select(n: Expr) -> Expr | None:
    """where(true, x, y) -> x;  where(false, x, y) -> y;  where(c, x, x) -> x"""
    condition, x, y = n.args
    if condition in (TRUE, FALSE):
        return x if condition is TRUE else y
    return x if x is y else None


def _select_bool(n: Expr) -> Expr | None:
    """where(c, x, false) -> c & x;  where(c, true, y) -> c | y;
    where(c, false, y) -> ~c & y;  where(c, x, true) -> ~c | x
    """
    condition, x, y = n.args
    if n.dtype != BOOL:
        return None
    if y is FALSE:
        return make("and", condition, x)
    if x is TRUE:
        return make("or", condition, y)
    if x is FALSE:
        return make("and", make("not", condition), y)
    return make("or", make("not", condition), x) if y is TRUE else None


def _cast_of_cast(n: Expr) -> Expr | None:
    """bool(i32(x)) -> x for a bool x;  f32(i32(x)) -> f32(x) for a bool x"""
    inner = n.args[0]
    if inner.args and inner.kind in ("i32", "i64", "f32") and inner.args[0].dtype == BOOL:
        return ir.cast(inner.args[0], n.dtype)
    return None


def _as_predicate(n: Expr) -> Expr | None:
    """bool(x) -> x != 0"""
    x = n.args[0]
    return make("ne", x, ir.const(0, x.dtype)) if x.kind != "const" else None


def _numeric_bool(n: Expr) -> Expr | None:
    """i32(x) != 0 -> x;  i32(x) == 0 -> ~x, for a bool x"""
    left, right = n.args
    if left.kind in ("i32", "i64", "f32") and left.args and left.args[0].dtype == BOOL and is_const(right, 0):
        return left.args[0] if n.kind == "ne" else make("not", left.args[0])
    return None


def _equal_to_truth(n: Expr) -> Expr | None:
    """x == true -> x;  x == false -> ~x, for a bool x, and != the other way round"""
    for x, value in (n.args, n.args[::-1]):
        if value in (TRUE, FALSE):
            return x if (value is TRUE) == (n.kind == "eq") else make("not", x)
    return None


def _constant_last(n: Expr) -> Expr | None:
    """c + x -> x + c"""
    left, right = n.args
    return ir.intern(n.kind, n.dtype, (right, left)) if is_const(left) and not is_const(right) else None


def _turn_less(n: Expr) -> Expr | None:
    """a <= b -> b >= a;  a < b -> b > a"""
    return make({"le": "ge", "lt": "gt"}[n.kind], n.args[1], n.args[0])


def _gather_constants(n: Expr) -> Expr | None:
    """(x + 1) + 2 -> x + 3, on integers only: float addition rounds; where 3 fits: x may be beyond 32 bits"""
    x, c = n.args
    if n.dtype == F32 or x.kind != n.kind or not is_const(c) or not is_const(x.args[1]):
        return None
    left, right = int(x.args[1].value or 0), int(c.value or 0)
    total = ir.const(left + right if n.kind == "add" else left * right, n.dtype)
    fits = total.value == (left + right if n.kind == "add" else left * right)
    return ir.intern(n.kind, n.dtype, (x.args[0], total)) if fits else None


def _reflexive(n: Expr) -> Expr | None:
    """x >= x -> true on integers (a NaN is not >= itself)"""
    if n.args[0] is n.args[1] and n.args[0].dtype != F32:
        return ir.const(n.kind in ("ge", "le", "eq"), BOOL)
    return None


def _always(n: Expr) -> Expr | None:
    """x >= y -> true on integers that do not overflow, where the least x is no less than the largest y, as in q >= 0

    It applies to no scalars and operands, which may be of any size where the arithmetic has 64 bits.
    """
    if n.args[0].dtype not in (I32, I64) or any(node.kind in ("scalar", "operand") for node in ir.walk(*n.args)):
        return None
    if max(map(magnitude, n.args)) > INT32_LIMIT:
        return None
    (least, _), (_, largest) = map(interval, n.args)
    return TRUE if least >= largest + (n.kind == "gt") else None


FLOAT_EXACT = 2**24  # up to it, every integer is a float32


def _whole(n: Expr) -> Expr | None:
    """f32(x) >= f32(y) -> x >= y for integers that float32 holds"""
    sides = [_integer(a) for a in n.args]
    return None if sides[0] is None or sides[1] is None else make(n.kind, sides[0], sides[1])


def _integer(node: Expr) -> Expr | None:
    if node.kind == "f32" and node.args[0].dtype in (I32, I64):
        return node.args[0] if magnitude(node.args[0]) <= FLOAT_EXACT else None
    exact = node.dtype == F32 and isinstance(node.value, float) and abs(node.value) <= FLOAT_EXACT
    return ir.const(int(node.value), I32) if exact and node.value == int(node.value) else None  # pyright: ignore


def _minus_negative(n: Expr) -> Expr | None:
    """x - c -> x + (-c) on integers, so that constants gather"""
    x, c = n.args
    if n.dtype == F32 or not is_const(c) or not isinstance(c.value, int):
        return None
    opposite = ir.const(-c.value, n.dtype)
    return make("add", x, opposite) if opposite.value == -c.value else None


def _shift_as_product(n: Expr) -> Expr | None:
    """x << 3 -> x * 8, which wraps like it"""
    x, count = n.args
    return x * fold(ir.intern(n.kind, n.dtype, (ir.const(1, n.dtype), count))) if is_const(count) else None


def _bits_as_remainder(n: Expr) -> Expr | None:
    """x & 0b1100 -> x // 4 % 4 * 4, for one run of ones;  x & -4 -> x // 4 * 4"""
    x, c = n.args
    bits = int(c.value or 0) if is_const(c) else 0
    lowest = bits & -bits  # the lowest one
    if bits == 0 or lowest > 2**30:
        return None
    run = bits // lowest + 1  # a power of two, or 0 where the run goes on to the sign
    if run & (run - 1) or run > 2**30:
        return None
    high = make("idiv", x, ir.const(lowest, n.dtype)) if lowest > 1 else x
    low = make("mod", high, ir.const(run, n.dtype)) if run else high
    return make("mul", low, ir.const(lowest, n.dtype)) if lowest > 1 else low


RULES: dict[str, tuple[Rule, ...]] = {
    "add": (_constant_last, _unit(0.0), _gather_constants),
    "sub": (_unit(0.0), _minus_negative),
    "mul": (_constant_last, _unit(1.0), _integer_zero, _gather_constants),
    "div": (_unit(1.0),),
    "pow": (_unit(1.0), _power_of_zero),
    "neg": (lambda n: n.args[0].args[0] if n.args[0].kind == "neg" else None,),
    "and": (_drops(TRUE), _absorbs(FALSE), _same),
    "or": (_drops(FALSE), _absorbs(TRUE), _same),
    "not": (_not,),
    "bitand": (_constant_last, _same, _unit(-1), _integer_zero, _bits_as_remainder),
    "bitor": (_constant_last, _same, _unit(0)),
    "bitxor": (_constant_last, _unit(0)),
    "lshift": (_shift_as_product,),
    "where": (_select, _select_bool),
    "max": (_same, _constant_last, _unit(-math.inf)),
    "min": (_same, _constant_last, _unit(math.inf)),
    "clamp_min": (_unit(-math.inf),),
    "clamp_max": (_unit(math.inf),),
    "bool": (_cast_of_cast, _as_predicate),
    "f32": (_cast_of_cast,),
    "i32": (_cast_of_cast,),
    "ge": (_reflexive, _whole, _always),
    "gt": (_reflexive, _whole, _always),
    "le": (_turn_less,),
    "lt": (_turn_less,),
    "eq": (_reflexive, _equal_to_truth, _constant_last, _numeric_bool, _whole),
    "ne": (_reflexive, _equal_to_truth, _constant_last, _numeric_bool, _whole),
}


def _divides_by_zero(node: Expr) -> bool:
    return node.kind in ("idiv", "mod") and is_const(node.args[1], 0)


def _step(node: Expr) -> Expr:
    if node.args and all(a.kind == "const" for a in node.args) and not _divides_by_zero(node):
        return fold(node)
    for rule in RULES.get(node.kind, ()):
        found = rule(node)
        if found is not None and found is not node:
            return found
    return node


def simplify(root: Expr) -> Expr:
    """An expression with the same value, to which no rule applies any more."""
    done: dict[Expr, Expr] = {}
    for node in ir.walk(root):
        done[node] = _settle(node, done)
    return done[root]


def _settle(node: Expr, done: dict[Expr, Expr]) -> Expr:
    args = tuple(done[a] for a in node.args)
    current = ir.intern(node.kind, node.dtype, args, node.value, node.dims) if args else node
    after = _step(current)
    if after is current:
        return current
    known = {**done, **{a: a for a in args}}
    for inner in ir.walk(after):  # a rule's result may itself be simplified; rules only ever shrink or order
        if inner not in known:
            known[inner] = _settle(inner, known)
    return known[after]


def powers(root: Expr) -> Expr:
    """x ** n for n = 2, 3, 4 as products; x ** 0.5, x ** -0.5, x ** -1 as sqrt, rsqrt and reciprocal.

    The results are equal but for rounding and for x = -inf, which is no score of finite queries and keys.
    """
    done: dict[Expr, Expr] = {}
    for node in ir.walk(root):
        args = tuple(done[a] for a in node.args)
        done[node] = ir.intern(node.kind, node.dtype, args, node.value, node.dims) if args else node
        if node.kind == "pow" and is_const(args[1]):
            done[node] = _product(args[0], float(args[1].value or 0.0)) or done[node]
    return done[root]


def _product(x: Expr, exponent: float) -> Expr | None:
    square = x * x
    known = {2.0: square, 3.0: square * x, 4.0: square * square, 0.5: make("sqrt", x), -0.5: make("rsqrt", x)}
    return known.get(exponent, make("reciprocal", x) if exponent == -1.0 else None)


def split_infinity(score: Expr) -> tuple[Expr, Expr]:
    """(score, mask) with the score's own -inf as a mask: where(p, x, -inf) is x under p, in any tree of choices.

    The same holds in sums: x + where(p, y, -inf) is x + y under p. (Only with an x of +inf or NaN, which no finite
    query and key give, is that sum NaN where the masked score is not.)
    """
    if score.kind == "where" and not ir.depends_on(score.args[0], ir.SCORE):
        condition = score.args[0]
        (x, p), (y, r) = (split_infinity(a) for a in score.args[1:])
        if p is TRUE and r is TRUE:
            return score, TRUE
        mask = simplify(make("or", make("and", condition, p), make("and", make("not", condition), r)))
        if p is FALSE or r is FALSE:
            return (y if p is FALSE else x), mask
        return make("where", condition, x, y), mask
    if is_const(score, -math.inf):
        return score, FALSE
    if score.kind == "add":
        (x, p), (y, r) = (split_infinity(a) for a in score.args)
        return (score if p is TRUE and r is TRUE else x + y), simplify(make("and", p, r))
    return score, TRUE


def normalize(program: Program) -> Program:
    """The simplified program; -inf that the score_mod itself returns has become a mask."""
    score, hidden = split_infinity(simplify(powers(program.score)))
    return ir.program(simplify(score), simplify(make("and", program.mask, hidden)))
