"""Splits a traced program by what its parts depend on: what needs no (q, kv) pair is computed outside, once.

Knows nothing of FX or tensors. A part that is computed outside becomes an operand of the program; the caller
evaluates it in the surrounding graph.
"""

from dataclasses import dataclass, field

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import BOOL, F32, I32, I64, SCORE, Expr, Program
from cudnn_flex_compile.scoremod.masks.linear import KV, linear
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.ranges import VALUE_LIMIT, magnitude


class PairGather(Exception):
    """A captured tensor is read at an index that depends on both q and kv."""


@dataclass(frozen=True, slots=True)
class Hoisted:
    """One operand: its expression over captures, indices and scalars, and the dtype in which it is stored."""

    expression: Expr
    dtype: str

    @property
    def dims(self) -> str:
        return ir.axes_of(self.expression)


@dataclass(slots=True)
class Partition:
    """operands: what to compute outside, by operand position."""

    operands: list[Hoisted] = field(default_factory=list[Hoisted])

    def operand(self, expression: Expr, dtype: str) -> Expr:
        hoisted = Hoisted(expression, dtype)
        if hoisted not in self.operands:
            self.operands.append(hoisted)
        return ir.operand(self.operands.index(hoisted), dtype, hoisted.dims)


ORDER = ("ge", "gt", "le", "lt")


def partition(program: Program) -> tuple[Program, list[Hoisted]]:
    """The program with operands in place of captures, and the operands.

    Raises:
        PairGather: for a gather that needs a (q, kv) pair.
    """
    parts = Partition()
    score = _inside(program.score, parts)
    mask = _inside(program.mask, parts)
    return ir.program(score, mask), parts.operands


def _captures(root: Expr) -> bool:
    return any(n.kind == "capture" for n in ir.walk(root))


def _one_sided(root: Expr) -> bool:
    axes = ir.axes_of(root)
    return not ("q" in axes and "k" in axes) and not ir.depends_on(root, SCORE)


def _outside(node: Expr) -> bool:
    """Whether to compute it outside: it reads a captured tensor, or is float work on batch and head alone."""
    if not node.args or not _one_sided(node):
        return False
    axes = set(ir.axes_of(node))
    computes = node.dtype == F32 and node.kind != F32  # a cast costs nothing inside
    return _captures(node) or (computes and bool(axes) and axes <= set("bh"))


def _inside(root: Expr, parts: Partition) -> Expr:
    done: dict[Expr, Expr] = {}

    def visit(node: Expr) -> Expr:
        if node not in done:
            done[node] = _visited(node)
        return done[node]

    def _visited(node: Expr) -> Expr:
        if _outside(node) and not _bounds_kv(node):
            return _as_operand(node, parts)
        if node.kind in ORDER:
            node = _limited(node, parts)
        if node.kind == "gather":
            raise PairGather(node)
        if not node.args:
            return node
        args = tuple(visit(a) for a in node.args)
        return ir.intern(node.kind, node.dtype, args, node.value, node.dims)

    return visit(root)


def _as_operand(node: Expr, parts: Partition) -> Expr:
    """The operand that holds `node`; a predicate is held as an integer."""
    if node.dtype == BOOL:
        return make("ne", parts.operand(ir.cast(node, I32), I32), ir.const(0, I32))
    return parts.operand(node, node.dtype)


def _bounds_kv(node: Expr) -> bool:
    """Whether it is a bound on kv by a captured limit of b and h: as one operand along kv it would be no bound."""
    if node.kind == "and":
        return any(_bounds_kv(a) for a in node.args)
    sides = _sides(node)
    if sides is None or "k" in ir.axes_of(sides[1]):
        return False
    factors = linear(sides[0]).factors
    return set(factors) == {KV} and abs(factors[KV]) == 1


def _sides(node: Expr) -> tuple[Expr, Expr] | None:
    """The position, I32, and the captured limit of a comparison of integers by order, if it is one."""
    if node.kind not in ORDER or node.args[0].dtype not in (I32, I64):
        return None
    position, limit = sorted(node.args, key=_captures)
    position = position.args[0] if position.kind == "i64" else position
    if _captures(position) or not _outside(limit) or position.dtype != I32 or magnitude(position) >= VALUE_LIMIT:
        return None
    return position, limit


def _limited(node: Expr, parts: Partition) -> Expr:
    """position >= limit -> position >= i32(clamp(limit)): a limit beyond every position is as good as the clamped
    one, with which nothing overflows
    """
    sides = _sides(node)
    if sides is None:
        return node
    position, limit = sides
    least, most = (ir.const(n, limit.dtype) for n in (-VALUE_LIMIT, VALUE_LIMIT))
    operand = parts.operand(ir.cast(make("min", make("max", limit, least), most), I32), I32)
    ordered = (operand, position) if node.args[0] is limit else (position, operand)
    return ir.intern(node.kind, BOOL, ordered)
