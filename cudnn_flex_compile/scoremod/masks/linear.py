"""Linear forms of integer expressions: a constant plus whole multiples of atoms.

A form is exact where no step of the original overflows, which `exact` proves. clauses.py and form.py solve masks by it.
"""

from dataclasses import dataclass, field

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import BOOL, I32, I64, Expr
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.ranges import INT32_LIMIT, VALUE_LIMIT, magnitude

Q, KV = ir.index("q"), ir.index("k")


@dataclass(frozen=True, slots=True)
class Linear:
    """sum(factor * atom) + constant."""

    factors: dict[Expr, int] = field(default_factory=dict[Expr, int])
    constant: int = 0

    def plus(self, other: "Linear", sign: int = 1) -> "Linear":
        factors = dict(self.factors)
        for atom, factor in other.factors.items():
            factors[atom] = factors.get(atom, 0) + sign * factor
        kept = {atom: factor for atom, factor in factors.items() if factor}
        return Linear(kept, self.constant + sign * other.constant)._rejoined()

    def times(self, factor: int) -> "Linear":
        return Linear({a: f * factor for a, f in self.factors.items() if factor}, self.constant * factor)

    def shifted(self, constant: int) -> "Linear":
        return Linear(self.factors, self.constant + constant)

    def replaced(self, atoms: dict[Expr, Expr]) -> "Linear":
        """The form with some atoms replaced by others."""
        form = Linear(constant=self.constant)
        for atom, factor in self.factors.items():
            form = form.plus(Linear({atoms.get(atom, atom): factor}))
        return form

    def without(self, atom: Expr) -> "Linear":
        return Linear({a: f for a, f in self.factors.items() if a is not atom}, self.constant)

    def _rejoined(self) -> "Linear":
        """x // d * d + x % d -> x"""
        for atom, factor in self.factors.items():
            if atom.kind != "mod" or atom.args[1].kind != "const":
                continue
            quotient = make("idiv", *atom.args)
            if self.factors.get(quotient) == factor * int(atom.args[1].value or 0) != 0:
                return self.without(atom).without(quotient).plus(linear(atom.args[0]).times(factor))
        return self

    def expression(self) -> Expr:
        """The form as a 64-bit expression that does not wrap.

        Its 64-bit atoms and scalars may be the largest integer, which stands for "no limit". They are clamped so that
        their sum is in range. A clamped number is still beyond every sum of indices, so no comparison changes.
        """
        total = ir.const(self.constant, I64)
        weight = sum(abs(factor) for atom, factor in self.factors.items() if _may_be_none(atom))
        for atom, factor in self.factors.items():
            term = _clamped(ir.cast(atom, I64), LARGE // weight) if _may_be_none(atom) else ir.cast(atom, I64)
            total = term * factor + total if factor != 1 else term + total
        return total


LARGE = 2**62


def _may_be_none(atom: Expr) -> bool:
    return atom.dtype == I64 or atom.kind == "scalar"


def _clamped(atom: Expr, limit: int) -> Expr:
    return make("min", make("max", atom, ir.const(-limit, I64)), ir.const(limit, I64))


def linear(node: Expr) -> Linear:
    """The linear form of an integer expression; whatever is not a sum or a multiple is an atom."""
    if node.kind == "const":
        return Linear(constant=int(node.value or 0))
    if node.kind in ("add", "sub"):
        return linear(node.args[0]).plus(linear(node.args[1]), 1 if node.kind == "add" else -1)
    if node.kind == "neg":
        return linear(node.args[0]).times(-1)
    if node.kind == "mul" and node.args[1].kind == "const":
        return linear(node.args[0]).times(int(node.args[1].value or 0))
    if node.kind == "i64" and node.args[0].dtype == I32:
        return linear(node.args[0])
    return Linear({node: 1})


# A captured 32-bit integer in a 32-bit sum is taken to be below this limit: beyond it, torch's own sum may wrap. A
# 64-bit sum does not wrap for any number that is an index or a length.
CAPTURED_LIMIT = 2**30


def exact(side: Expr) -> bool:
    """Whether no step of an integer expression overflows, so that it means what its linear form means."""
    return side.dtype == I64 or magnitude(side, CAPTURED_LIMIT) <= INT32_LIMIT


def nonnegative_form(predicate: Expr) -> Linear | None:
    """L with `predicate` equivalent to L >= 0: for `a >= b` and, on integers, `a > b`.

    It also takes a comparison of an exact integer with a number that has a fraction: n >= 2.5 is n - 3 >= 0.
    """
    if predicate.kind not in ("ge", "gt"):
        return None
    if predicate.args[0].dtype not in (I32, I64):
        return _against_fraction(predicate)
    form = linear(predicate.args[0]).plus(linear(predicate.args[1]), -1)
    form = form if predicate.kind == "ge" else form.shifted(-1)
    right = all(exact(side) for side in predicate.args)
    return form if right and abs(form.constant) <= VALUE_LIMIT // 2 else None


FLOAT_EXACT = 2**24  # below it, every integer is a float32


def _against_fraction(predicate: Expr) -> Linear | None:
    left, right = predicate.args
    for number, other, sign in ((right, left, 1), (left, right, -1)):
        whole = other.args[0] if other.kind == "f32" else other
        integer = whole is not other and whole.dtype in (I32, I64, BOOL) and whole.dtype != BOOL
        if number.kind != "const" or not integer or not isinstance(number.value, float):
            continue
        if not abs(number.value) < FLOAT_EXACT // 2 or magnitude(whole) > INT32_LIMIT:
            return None
        # n >= c is n >= ceil(c); n > c is n >= floor(c) + 1; c >= n is n <= floor(c); c > n is n <= ceil(c) - 1.
        # Rounding n to float32 keeps its order, and moves no n across a number below 2**24.
        strict = predicate.kind == "gt"
        if sign > 0:
            limit = _floor(number.value) + 1 if strict else -_floor(-number.value)
            return linear(whole).shifted(-limit)
        limit = -_floor(-number.value) - 1 if strict else _floor(number.value)
        return linear(whole).times(-1).shifted(limit)
    return None


def _floor(value: float) -> int:
    return int(value // 1)
