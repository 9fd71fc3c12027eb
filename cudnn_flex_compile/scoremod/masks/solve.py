"""Solves a mask for kv: integer bounds, row intervals, a predicate of the columns, and what is left.

Every result is equivalent to the mask: a clause that is not provably a bound stays a predicate. partition.py makes the
parts of a program from them.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import FALSE, I64, SCORE, TRUE, Expr
from cudnn_flex_compile.scoremod.masks.bound import Bound, bound_of
from cudnn_flex_compile.scoremod.masks.clauses import Clause, Half, Literal, clauses
from cudnn_flex_compile.scoremod.masks.form import tightest
from cudnn_flex_compile.scoremod.masks.linear import KV
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.ranges import VALUE_LIMIT
from cudnn_flex_compile.scoremod.simplify import simplify
from cudnn_flex_compile.scoremod.text import infix


@dataclass(frozen=True, slots=True)
class Solved:
    """The mask is the conjunction of all parts.

    Attributes:
        bounds: limits of q - kv or of kv, by constants and scalars.
        ends, starts: integer expressions of b, h and q: kv < end, kv >= start.
        columns: a predicate of b, h and kv.
        residual: a predicate of anything.
    """

    bounds: tuple[Bound, ...] = ()
    ends: tuple[Expr, ...] = ()
    starts: tuple[Expr, ...] = ()
    columns: Expr = TRUE
    residual: Expr = TRUE


def solve(mask: Expr) -> Solved:
    """The parts of a simplified mask, as traced (with captures)."""
    found = _reduced(clauses(mask))
    bounds: list[Bound] = []
    ends: list[Expr] = []
    starts: list[Expr] = []
    columns, residual = TRUE, TRUE
    for clause in found:
        halves, rows, others = _sorted(clause)
        upward = {h.step > 0 for h in halves}
        bound = bound_of(halves[0].form) if len(clause) == len(halves) == 1 else None
        if not clause:
            bound = Bound("end", -1)  # nothing is visible
        if bound is not None:
            bounds.append(bound)
        elif not others and len(upward) < 2 and (len(halves) < 2 or _reads_captures(clause)):
            # The clause is half-lines of one direction, or predicates that show all of a row. It becomes the end
            # where(row, everything, the furthest end), and without half-lines where(row, everything, 0).
            (starts if upward == {True} else ends).append(_limit(halves, rows, upward == {True}))
        elif not halves and not rows and all("q" not in ir.axes_of(x) for x in others):
            columns = make("and", columns, _together("or", others))
        else:
            residual = make("and", residual, _together("or", _ordered(clause)))
    parts = tightest(bounds), _merged(ends, "min"), _merged(starts, "max")
    return Solved(*parts, simplify(columns), simplify(residual))


def _sorted(clause: Clause) -> tuple[list[Half], list[Expr], list[Expr]]:
    """The half-lines of a clause, its predicates of rows, and its other predicates."""
    literals = [x for x in clause if isinstance(x, Expr)]
    rows = [x for x in literals if "k" not in ir.axes_of(x) and not ir.depends_on(x, SCORE)]
    halves = sorted((x for x in clause if isinstance(x, Half)), key=lambda h: infix(predicate(h)))
    return halves, sorted(rows, key=infix), sorted((x for x in literals if x not in rows), key=infix)


def _ordered(clause: Clause) -> list[Expr]:
    return sorted((predicate(x) for x in clause), key=infix)


def _together(kind: str, parts: Iterable[Expr]) -> Expr:
    result: Expr | None = None
    for part in parts:
        result = part if result is None else make(kind, result, part)
    return ir.FALSE if result is None else result


def predicate(literal: Literal) -> Expr:
    """The expression of a literal."""
    if isinstance(literal, Expr):
        return literal
    bound = bound_of(literal.form)
    if bound is not None:
        return bound.predicate()
    return make("ge", literal.form.expression(), ir.const(0, I64))


def _reads_captures(clause: Clause) -> bool:
    nodes = [n for x in clause for n in ([a for a, _ in x.terms] if isinstance(x, Half) else [x])]
    return any(n.kind in ("capture", "gather") for n in ir.walk(*nodes))


EVERYTHING = ir.const(VALUE_LIMIT, I64)


def _limit(halves: list[Half], rows: list[Expr], start: bool) -> Expr:
    none = ir.const(VALUE_LIMIT if start else 0, I64)
    limit: Expr | None = None
    for half in halves:
        own = limit_of(half)
        limit = own if limit is None else make("min" if start else "max", limit, own)
    for row in rows:
        everything = ir.const(0, I64) if start else EVERYTHING
        limit = make("where", row, everything, none if limit is None else limit)
    return simplify(none if limit is None else limit)


def limit_of(half: Half) -> Expr:
    """`start` with kv >= start, or `end` with kv < end.

    k * n + r >= 0 for n > 0 is k >= ceil(-r / n) = -floor(r / n); r - k * n >= 0 is k <= floor(r / n).
    """
    step, rest = half.step, half.form.without(KV).expression()
    size = ir.const(abs(step), I64)
    quotient = rest if abs(step) == 1 else make("idiv", rest, size)
    return -quotient if step > 0 else quotient + ir.const(1, I64)


def _merged(limits: list[Expr], kind: str) -> tuple[Expr, ...]:
    """The tightest of all limits, as one expression, because cuDNN takes few operands along the rows."""
    merged = functools.reduce(lambda x, y: make(kind, x, y), limits) if limits else None
    return () if merged is None else (simplify(merged),)


def _reduced(found: list[Clause]) -> list[Clause]:
    """The clauses without those that others imply, and without literals that others rule out."""
    found = [c for c in map(_weakest, found) if c is not None]
    units = [x for c in found if len(c) == 1 for x in c if isinstance(x, Half)]
    for unit in list(units):
        units = [u for u in units if u is unit or not _implies(unit, u) or _implies(u, unit)]
    kept: list[Clause] = []
    for clause in found:
        if len(clause) > 1:
            if any(_implies(u, x) for u in units for x in clause):
                continue
            clause = frozenset(x for x in clause if not any(_excludes(u, x) for u in units))
        kept.append(clause)
    return [c for c in dict.fromkeys(kept) if not any(other < c for other in kept)]


def _weakest(clause: Clause) -> Clause | None:
    """The clause with one half-line for each direction, or None if it always holds."""
    kept: list[Literal] = []
    for literal in clause:
        if literal is FALSE:
            continue
        if literal is TRUE or (isinstance(literal, Half) and _always(literal)):
            return None
        if any(_implies(literal, other) for other in clause if other is not literal and other != literal):
            continue  # the other one is weaker
        if isinstance(literal, Half) and _never(literal):
            continue
        kept.append(literal)
    for literal in kept:
        if isinstance(literal, Half):
            for other in kept:
                opposite = isinstance(other, Half) and other.terms == literal.opposite_terms()
                if opposite and literal.constant + other.constant >= -1:  # x >= a or x <= b, with no gap  # pyright: ignore
                    return None
    return frozenset(kept)


def _implies(left: Literal, right: Literal) -> bool:
    if not (isinstance(left, Half) and isinstance(right, Half)):
        return left is right
    return left.terms == right.terms and left.constant <= right.constant


def _excludes(left: Literal, right: Literal) -> bool:
    if not (isinstance(left, Half) and isinstance(right, Half)):
        return False
    return left.terms == right.opposite_terms() and left.constant + right.constant < 0


def _always(half: Half) -> bool:
    """Whether a half-line holds for all pairs: no index is negative."""
    return half.constant >= 0 and all(a.kind == "index" and f > 0 for a, f in half.terms)


def _never(half: Half) -> bool:
    return half.constant < 0 and all(a.kind == "index" and f < 0 for a, f in half.terms)
