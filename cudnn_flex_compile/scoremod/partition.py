"""Splits a traced program by what its parts depend on: what needs no (q, kv) pair is computed outside, once.

Knows nothing of FX or tensors. A part that is computed outside becomes an operand of the program; the caller
evaluates it in the surrounding graph.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import BOOL, F32, I32, I64, SCORE, Expr, Program
from cudnn_flex_compile.scoremod.optable import make


class PairGather(Exception):
    """A captured tensor is read at an index that depends on both q and kv."""


@dataclass(frozen=True, slots=True)
class Hoisted:
    """One operand: its expression over captures, indices and scalars, and the dtype in which it is stored.

    An I64 expression stored as I32 is clamped to the range: it is only ever compared with an I32 one, by order.
    """

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
        if node.kind in ORDER and node.args[0].dtype == I64:
            return _compared(node, visit, parts)
        if _outside(node):
            return _as_operand(node, parts)
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


def _compared(node: Expr, visit: Callable[[Expr], Expr], parts: Partition) -> Expr:
    """A comparison by order of a 64-bit operand with a 32-bit value: the operand clamped to 32 bits gives the same."""
    sides: list[Expr] = []
    for side in node.args:
        narrow = side.args[0] if side.kind == "i64" and side.args[0].dtype == I32 else None
        if _outside(side):
            sides.append(parts.operand(side, I32))
        elif narrow is not None:
            sides.append(visit(narrow))
        else:
            sides.append(visit(side))
    if any(s.dtype == I64 for s in sides):
        return ir.intern(node.kind, BOOL, tuple(visit(a) for a in node.args))
    return ir.intern(node.kind, BOOL, tuple(sides))
