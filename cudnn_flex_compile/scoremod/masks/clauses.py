"""A mask as clauses: the conjunction of disjunctions of half-lines of kv and of other predicates.

solve.py sorts the clauses into bounds and the rest. Integers are exact, so a strict comparison is a non-strict one, and
every step is an equivalence:

    floor(x / d) >= m  is  x >= m * d             for d > 0
    floor(x / d) <= m  is  x <= m * d + d - 1
    max(x, y) + r >= 0  is  x + r >= 0 or y + r >= 0, and min, |x| = max(x, -x) and clamps likewise
    where(c, x, y) + r >= 0  is  (not c or x + r >= 0) and (c or y + r >= 0)
"""

import itertools
import math
from dataclasses import dataclass

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import BOOL, FALSE, I32, I64, TRUE, Expr
from cudnn_flex_compile.scoremod.masks.linear import KV, Linear, exact, linear, nonnegative_form
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.simplify import simplify
from cudnn_flex_compile.scoremod.text import infix

MAX_CLAUSES = 48  # clauses of one mask: a larger disjunction stays one predicate


@dataclass(frozen=True, slots=True)
class Half:
    """A half-line of kv for each (b, h, q): constant + sum(factor * atom) >= 0; only kv itself varies along kv."""

    terms: frozenset[tuple[Expr, int]]
    constant: int

    @property
    def form(self) -> Linear:
        return Linear(dict(sorted(self.terms, key=lambda t: infix(t[0]))), self.constant)

    @property
    def step(self) -> int:
        """The factor of kv: positive for `kv >= start`, negative for `kv < end`."""
        return dict(self.terms)[KV]

    def opposite_terms(self) -> frozenset[tuple[Expr, int]]:
        return frozenset((atom, -factor) for atom, factor in self.terms)


Literal = Half | Expr
Clause = frozenset[Literal]


def clauses(mask: Expr) -> list[Clause]:
    """The clauses of a simplified mask."""
    return _clauses(mask, True)


def _clauses(node: Expr, positive: bool) -> list[Clause]:
    if node in (TRUE, FALSE):
        return [] if (node is TRUE) == positive else [frozenset()]
    if node.kind == "not":
        return _clauses(node.args[0], not positive)
    if node.kind in ("and", "or"):
        sides = [_clauses(a, positive) for a in node.args]
        together = _all(*sides) if (node.kind == "and") == positive else _any(*sides)
        return [_opaque(node, positive)] if together is None else together
    if node.kind == "where" and node.dtype == BOOL:
        condition, x, y = node.args
        return _either(condition, _clauses(x, positive), _clauses(y, positive), node, positive)
    if node.kind in ("eq", "ne") and all(_truth(a) is not None for a in node.args):
        left, right = (_truth(a) or a for a in node.args)
        same = (node.kind == "eq") == positive
        return _either(left, _clauses(right, same), _clauses(right, not same), node, positive)
    found = _comparison(node, positive) if "k" in ir.axes_of(node) else None
    return [_opaque(node, positive)] if found is None else found


def _truth(node: Expr) -> Expr | None:
    """The predicate that an integer expression is (0 or 1), or None."""
    if node.dtype == BOOL:
        return node
    return node.args[0] if node.kind in (I32, I64) and node.args[0].dtype == BOOL else None


def _opaque(node: Expr, positive: bool) -> Clause:
    return frozenset([node if positive else simplify(make("not", node))])


def _all(*parts: list[Clause]) -> list[Clause]:
    return list(dict.fromkeys(itertools.chain(*parts)))


def _any(left: list[Clause], right: list[Clause]) -> list[Clause] | None:
    if len(left) * len(right) > MAX_CLAUSES:
        return None
    return list(dict.fromkeys(a | b for a in left for b in right))


def _either(condition: Expr, x: list[Clause], y: list[Clause], node: Expr, positive: bool) -> list[Clause]:
    """(not condition or x) and (condition or y)"""
    parts = _any(_clauses(condition, False), x), _any(_clauses(condition, True), y)
    if parts[0] is None or parts[1] is None:
        return [_opaque(node, positive)]
    return _all(parts[0], parts[1])


def _comparison(node: Expr, positive: bool) -> list[Clause] | None:
    """A comparison of integers as clauses of half-lines, if every part that varies along kv can be solved for it."""
    if node.kind in ("ge", "gt"):
        form = nonnegative_form(node)
        if form is None:
            return None
        return _at_least(form if positive else form.times(-1).shifted(-1))
    if node.kind not in ("eq", "ne") or node.args[0].dtype not in (I32, I64) or not all(map(exact, node.args)):
        return None
    form = linear(node.args[0]).plus(linear(node.args[1]), -1)
    if (node.kind == "eq") == positive:
        sides = _at_least(form), _at_least(form.times(-1))
        return None if sides[0] is None or sides[1] is None else _all(sides[0], sides[1])
    sides = _at_least(form.shifted(-1)), _at_least(form.times(-1).shifted(-1))
    return None if sides[0] is None or sides[1] is None else _any(sides[0], sides[1])


CHOICES = ("max", "min", "clamp_min", "clamp_max", "abs")


def _at_least(form: Linear) -> list[Clause] | None:
    """form >= 0"""
    varying = [atom for atom in form.factors if atom is not KV and "k" in ir.axes_of(atom)]
    if not varying:
        if KV in form.factors:
            return [frozenset([_half(form)])]
        return _clauses(simplify(make("ge", form.expression(), ir.const(0, I64))), True) if form.factors else (
            [] if form.constant >= 0 else [frozenset()]
        )  # fmt: skip
    atom = varying[0]
    factor, rest = form.factors[atom], form.without(atom)
    if atom.kind in CHOICES:
        return _choice(atom, factor, rest)
    if atom.kind == "where" and atom.dtype in (I32, I64):
        sides = [_at_least(rest.plus(linear(x).times(factor))) for x in atom.args[1:]]
        if sides[0] is None or sides[1] is None:
            return None
        whole = make("ge", form.expression(), ir.const(0, I64))
        return _either(atom.args[0], sides[0], sides[1], whole, True)
    if atom.kind in (I32, I64) and atom.args[0].dtype == BOOL:  # a predicate as a number
        sides = [_at_least(rest.shifted(n * factor)) for n in (1, 0)]
        if sides[0] is None or sides[1] is None:
            return None
        return _either(atom.args[0], sides[0], sides[1], make("ge", form.expression(), ir.const(0, I64)), True)
    if atom.kind == "idiv" and abs(factor) == 1 and atom.args[1].kind == "const" and int(atom.args[1].value or 0) > 0:
        return _quotient(atom, factor, rest)
    return None


def _half(form: Linear) -> Half:
    """n * x + c >= 0 is x + floor(c / n) >= 0"""
    common = math.gcd(*form.factors.values())
    return Half(frozenset((a, f // common) for a, f in form.factors.items()), form.constant // common)


def _choice(atom: Expr, factor: int, rest: Linear) -> list[Clause] | None:
    forms = [linear(a) for a in atom.args]
    if atom.kind == "abs":
        forms.append(forms[0].times(-1))
    sides = [_at_least(rest.plus(f.times(factor))) for f in forms]
    if sides[0] is None or sides[1] is None:
        return None
    largest = atom.kind in ("max", "clamp_min", "abs")
    return _any(sides[0], sides[1]) if largest == (factor > 0) else _all(sides[0], sides[1])


def _quotient(atom: Expr, factor: int, rest: Linear) -> list[Clause] | None:
    dividend, divisor = linear(atom.args[0]), int(atom.args[1].value or 0)
    if factor > 0:  # floor(x / d) + rest >= 0
        return _at_least(dividend.plus(rest.times(divisor)))
    return _at_least(rest.times(divisor).shifted(divisor - 1).plus(dividend, -1))
