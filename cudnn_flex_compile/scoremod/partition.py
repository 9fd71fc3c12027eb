"""Splits a traced program by what its parts depend on: what needs no (q, kv) pair is computed outside, once.

Knows nothing of FX or tensors. A part that is computed outside becomes an operand of the program; the caller
evaluates it in the surrounding graph.
"""

from dataclasses import dataclass, field

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import BOOL, F32, I32, I64, SCORE, Expr, Program
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
    return _captures(node) or (node.dtype == F32 and set(ir.axes_of(node)) and not set(ir.axes_of(node)) - set("bh"))


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
    """Whether it is a bound on kv by captured limits of b and h: as an operand along kv it would be no bound."""
    if node.kind == "and":
        return any(_bounds_kv(a) for a in node.args)
    limit = _limit(node)
    return limit is not None and "k" not in ir.axes_of(node.args[limit]) and "k" in ir.axes_of(node.args[1 - limit])


def _limit(node: Expr) -> int | None:
    """Which side of a comparison of integers by order is captured, if only one is, and needs no (q, kv) pair."""
    if node.kind not in ORDER or node.args[0].dtype not in (I32, I64):
        return None
    captured = [_captures(a) for a in node.args]
    side = captured.index(True) if any(captured) else 0
    return side if sum(captured) == 1 and _outside(node.args[side]) else None


def _limited(node: Expr, parts: Partition) -> Expr:
    """position >= limit -> i32(position) >= clamp(limit): with a limit beyond all positions, or one at the ends of
    its dtype, sums in 32 bits would overflow
    """
    side = _limit(node)
    if side is None:
        return node
    position = node.args[1 - side]
    position = position.args[0] if position.kind == "i64" and position.args[0].dtype == I32 else position
    if position.dtype != I32 or magnitude(position) >= VALUE_LIMIT:
        return node
    limit = node.args[side]
    clamped = make("min", make("max", limit, ir.const(-VALUE_LIMIT, limit.dtype)), ir.const(VALUE_LIMIT, limit.dtype))
    sides = [position, parts.operand(ir.cast(clamped, I32), I32)]
    return ir.intern(node.kind, BOOL, tuple(sides if side else reversed(sides)))
