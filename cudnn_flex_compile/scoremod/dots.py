"""Dots of rows of captured tensors that are added to the raw score: `score + factor * dot(a[b, h, q], c[b, h, kv])`.

Such a sum is the raw score of longer queries and keys, to which the rows are appended
(passes/write/longer_heads.py); the program is that of the sum. This file finds the sum in a traced score_mod, and reads
which rows are meant. It works on expressions alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, SCORE, Expr
from cudnn_flex_compile.scoremod.ranges import narrow
from cudnn_flex_compile.scoremod.simplify import simplify
from cudnn_flex_compile.scoremod.text import infix

SUM = ir.intern("score", F32, value="with dots")  # the sum, until all of it is found
ONE, ZERO = ir.const(1.0, F32), ir.const(0.0, F32)
HEAD = ir.index("h")


class NotAdded(Exception):
    """A dot of vectors that no longer head computes; the message says why."""


@dataclass(frozen=True, slots=True)
class Row:
    """The rows of a captured tensor that stand beside those of queries or keys.

    Attributes:
        source: the tensor's leaf.
        places: the index of each of its dimensions: b, h, h // n, q or kv, the lane, or a constant.
        stopped: whether the function lets no gradient through.
    """

    source: Expr
    places: tuple[Expr, ...]
    stopped: bool

    @property
    def lanes(self) -> int:
        """The number of entries of a row."""
        return next(int(p.value or 0) for p in self.places if p.kind == "lane")


@dataclass(frozen=True, slots=True)
class Dot:
    """A term of a sum: the dot of a query's row and a key's, times a factor, which depends on b, h and q at most."""

    query: Row
    key: Row
    factor: Expr

    @property
    def learned(self) -> set[Expr]:
        """The leaves of captured tensors to which a gradient flows, if they take one."""
        return {row.source for row in (self.query, self.key) if not row.stopped}


def split_dots(score: Expr) -> tuple[Expr, tuple[Dot, ...]]:
    """The score over the sum in place of the raw score, and the dots of the sum.

    Raises:
        NotAdded: where dots are not all added to the raw score, inside of all else that is done to it; or where their
            rows or factors are not plain.
    """
    dots = [node for node in ir.walk(score) if node.kind == "dot"]
    if not dots:
        return score, ()
    sums: list[Mapping[Expr, Expr]] = []
    rest = _over_sum(score, dots, sums, {})
    if any(node is SCORE or node.kind == "dot" for node in ir.walk(rest)) or any(s != sums[0] for s in sums):
        raise NotAdded("a dot of captured vectors that is not added to the raw score, inside of all that is done to it")
    return ir.rebuild(rest, {SUM: SCORE}), tuple(_dot(node, sums[0][node]) for node in dots)


def _over_sum(node: Expr, dots: list[Expr], sums: list[Mapping[Expr, Expr]], done: dict[Expr, Expr]) -> Expr:
    """An expression with SUM in place of each sum of the raw score and all dots, as large as can be. The factors of the
    dots in each are added to `sums`.
    """
    if node in done or not node.args:
        return done.get(node, node)
    found = _sum(node, dots)
    if found is None:
        args = tuple(_over_sum(a, dots, sums, done) for a in node.args)
        done[node] = ir.intern(node.kind, node.dtype, args, node.value, node.dims)
    else:
        done[node] = found[0]
        sums.append(found[1])
    return done[node]


def _sum(node: Expr, dots: list[Expr]) -> tuple[Expr, Mapping[Expr, Expr]] | None:
    """x * score + y * dot + rest -> (SUM * x + rest, {dot: y / x}), where x is a constant and all dots are there; None
    for anything else.
    """
    factors: dict[Expr, Expr] = {}
    rest = ZERO
    for term, factor in _terms(node, ONE):
        if term is SCORE or term in dots:
            factors[term] = factors[term] + factor if term in factors else factor
        elif _fixed(term):
            rest = rest + term * factor
        else:
            return None
    own = _simple(factors.pop(SCORE, ZERO))
    if own.kind != "const" or not own.value or factors.keys() != set(dots):
        return None
    return SUM * own + rest, {dot: _simple(factor / own) for dot, factor in factors.items()}


def _simple(root: Expr) -> Expr:
    return simplify(narrow(root))


def _terms(node: Expr, factor: Expr) -> list[tuple[Expr, Expr]]:
    """Terms and their factors, whose products' sum is node * factor."""
    match node.kind, node.args:
        case "add", (first, second):
            return _terms(first, factor) + _terms(second, factor)
        case "sub", (first, second):
            return _terms(first, factor) + _terms(second, -factor)
        case "neg", (first,):
            return _terms(first, -factor)
        case "mul", (first, second) if _fixed(second):
            return _terms(first, factor * second)
        case "mul", (first, second) if _fixed(first):
            return _terms(second, factor * first)
        case "div", (first, second) if _fixed(second):
            return _terms(first, factor / second)
        case _:
            return [(node, factor)]


def _fixed(node: Expr) -> bool:
    """Whether an expression has neither the score nor a dot."""
    return not any(n is SCORE or n.kind == "dot" for n in ir.walk(node))


def _dot(node: Expr, factor: Expr) -> Dot:
    if "k" in ir.axes_of(factor):
        raise NotAdded("a factor of a dot that varies along kv")
    query, key = node.args
    return Dot(_row(query, "q"), _row(key, "k"), factor)


def _row(side: Expr, axis: str) -> Row:
    stopped = side.kind == "stop"
    read = side.args[0] if stopped else side
    if read.kind != "gather":
        raise NotAdded("a dot of more than two vectors, or of vectors that are computed, not read")
    places = tuple(_simple(i) for i in read.args[1:])
    seen: set[str] = set()
    for place in places:
        name = _place(place, axis)
        if name is None or name in seen:
            own = "b, h, h // n and q" if axis == "q" else "b, h, h // n and kv"
            raise NotAdded(f"a vector that is read at {infix(place)}, not at {own}, once each")
        seen |= {name} - {"const"}
    return Row(read.args[0], places, stopped)


def _place(place: Expr, axis: str) -> str | None:
    """The axis along which an index goes, `const`, or None for any other index."""
    if place.kind in ("lane", "const"):
        return place.kind
    if place.kind == "index" and place.value in ("b", "h", axis):
        return str(place.value)
    groups = place.kind == "idiv" and place.args[0] is HEAD and place.args[1].kind == "const"
    return "h" if groups and int(place.args[1].value or 0) > 0 else None
