"""Splits a traced program into parts that the kernel computes, and parts that are computed once outside of it.

A part that is computed outside becomes an operand of the program; the caller evaluates it in the surrounding graph
(passes/write/operands.py). This file works on expressions alone. It moves out

    parts that read a captured tensor, and depend on one of (b, h, q) or (b, h, kv) only;
    the limits of row intervals, kv < end[b, h, q], in 64 bits and clamped to the number of keys: a clamped limit shows
        the same keys, and nothing overflows;
    predicates of the columns and, where the kernel cannot compute them, of (q, kv) pairs, as biases of 0 and -inf;
    other parts of a score that read captured tensors at (q, kv) pairs, or that depend on pairs and have no legal form;
    terms of captured tensors that require grad, as one tensor over pairs (learned.py).
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import TORCH_DTYPE
from cudnn_flex_compile.scoremod.ir import BOOL, F32, I32, I64, SCORE, TRUE, Expr, Program
from cudnn_flex_compile.scoremod.learned import PAIRS, NotAdditive, reads, split_bias, with_bias
from cudnn_flex_compile.scoremod.legalize import computes
from cudnn_flex_compile.scoremod.masks.bound import Bound
from cudnn_flex_compile.scoremod.masks.form import hides, split
from cudnn_flex_compile.scoremod.masks.linear import KV
from cudnn_flex_compile.scoremod.masks.solve import solve
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.ranges import VALUE_LIMIT, magnitude
from cudnn_flex_compile.scoremod.simplify import simplify

HALF = torch.bfloat16  # holds 0 and -inf
Stored = Mapping[Expr, torch.dtype]


class ScoreGather(Exception):
    """A captured tensor is read at an index that depends on the score."""


@dataclass(frozen=True, slots=True)
class Hoisted:
    """One operand.

    Attributes:
        expression: over captures, indices and scalars.
        stored: the dtype in which the operand is computed and kept.
        limit: whether it is a limit of kv, which is clamped to the number of keys.
        learned: whether it takes a gradient; it has an entry for each pair then.
    """

    expression: Expr
    stored: torch.dtype
    limit: bool = False
    learned: bool = False

    @property
    def dims(self) -> str:
        """The axes along which it varies, of `bhqk`."""
        axes = {*ir.axes_of(self.expression), *(PAIRS if self.learned else "")}
        return "".join(a for a in ir.AXES if a in axes)


@dataclass(slots=True)
class Partition:
    """operands: the parts to compute outside, by operand position. stored: the dtypes of 16-bit captures."""

    stored: Stored
    operands: list[Hoisted] = field(default_factory=list[Hoisted])

    def operand(
        self, expression: Expr, dtype: str, stored: torch.dtype | None = None, limit: bool = False,
        learned: bool = False,
    ) -> Expr:  # fmt: skip
        hoisted = Hoisted(expression, stored or TORCH_DTYPE[dtype], limit, learned)
        if hoisted not in self.operands:
            self.operands.append(hoisted)
        return ir.operand(self.operands.index(hoisted), dtype, hoisted.dims)

    def value(self, node: Expr) -> Expr:
        """The operand that holds a part. A predicate becomes kv < limit, where the limit is all keys or none."""
        if node.dtype == BOOL:
            ends = (ir.const(n, I32) for n in (VALUE_LIMIT, 0))
            return make("gt", self.operand(make("where", node, *ends), I32), KV)
        if node.dtype == I64:
            raise ScoreGather(node)
        large = node.dtype == F32 and set(PAIRS) <= set(ir.axes_of(node))
        return self.operand(node, node.dtype, self._exactly(node) if large else None)

    def learned(self, node: Expr | None) -> Expr | None:
        """The operand of a bias that takes a gradient."""
        return None if node is None else self.operand(node, F32, self._exactly(node), learned=True)

    def _exactly(self, node: Expr) -> torch.dtype | None:
        """The 16-bit dtype that holds every value, if one does."""
        if node.kind == "stop":
            return self._exactly(node.args[0])
        if node.kind == "gather":
            return self.stored.get(node.args[0])
        if node.kind == "where":
            values = [a for a in node.args[1:] if a.kind != "const" or a.value not in (0.0, float("-inf"))]
            kinds = {self._exactly(a) for a in values}
            return kinds.pop() if len(kinds) == 1 else None
        return None

    def bias(self, predicate: Expr) -> Expr:
        """The predicate, held as 0 where it is true and -inf elsewhere."""
        shown, hidden = ir.const(0.0, F32), ir.const(float("-inf"), F32)
        return hides(self.operand(make("where", predicate, shown, hidden), F32, HALF))


def partition(
    program: Program, stored: Stored | None = None, learned: Set[Expr] = frozenset()
) -> tuple[Program, list[Hoisted]]:
    """The program with operands in place of captures, and the operands.

    Args:
        program: normalized, over captures.
        stored: the dtypes of the captures that are 16-bit floats.
        learned: the captures that require grad.

    Raises:
        ScoreGather: for a gather at an index that depends on the score.
        NotAdditive: where a capture that requires grad is more than added to the score.
    """
    if reads(program.mask, learned):
        raise NotAdditive("the mask")
    parts = Partition(stored or {})
    rest, bias = split_bias(program.score, learned)
    score = with_bias(_inside(rest, parts), parts.learned(bias))
    return ir.program(score, _mask(program.mask, parts)), parts.operands


def pairwise(program: Program) -> tuple[Program, list[Hoisted]] | None:
    """The program with its mask as one predicate over operands that vary along q or along kv, but not along both.

    No kernel computes this mask; it tells quickly which pairs are visible. None where the mask reads a captured tensor
    at pairs.
    """
    parts = Partition({})
    mask = _along_one(program.mask, parts)
    return None if mask is None else (ir.program(program.score, simplify(mask)), parts.operands)


def _along_one(node: Expr, parts: Partition) -> Expr | None:
    if not _captures(node):
        return node
    if not {"q", "k"} <= set(ir.axes_of(node)):
        return parts.operand(node, node.dtype)
    if node.kind == "gather":
        return None
    args = [_along_one(a, parts) for a in node.args]
    found = tuple(a for a in args if a is not None)
    return ir.intern(node.kind, node.dtype, found, node.value, node.dims) if len(found) == len(args) else None


def _mask(mask: Expr, parts: Partition) -> Expr:
    solved = solve(mask)
    terms = [bound.predicate() for bound in solved.bounds]
    terms += [make("ge", KV, parts.operand(start, I32, limit=True)) for start in solved.starts]
    terms += [make("gt", parts.operand(end, I32, limit=True), KV) for end in solved.ends]
    columns, residual = solved.columns, solved.residual
    outside = residual is not TRUE and not _beside(residual, solved.bounds)
    if outside and set(ir.axes_of(columns)) <= set(ir.axes_of(residual)):
        columns, residual = TRUE, make("and", columns, residual)  # one bias hides the pairs of both, and is no larger
    if columns is not TRUE:
        terms.append(parts.bias(columns))
    if residual is not TRUE:
        terms.append(parts.bias(residual) if outside else residual)
    result = TRUE
    for term in terms:
        result = make("and", result, term)
    return simplify(result)


def _beside(residual: Expr, bounds: Sequence[Bound]) -> bool:
    """Whether the kernel computes the residual itself, beside the bounds.

    Beside a band, by which tiles are skipped, a bias is the faster one, unless the parts are bounds themselves.
    """
    if _captures(residual) or not computes(residual):
        return False
    return _of_bounds(residual) or not any(bound.diagonal for bound in bounds)


def _of_bounds(residual: Expr) -> bool:
    """Whether a predicate is clauses of integer bounds alone."""
    if residual.kind in ("and", "or"):
        return all(_of_bounds(a) for a in residual.args)
    return bool(split(residual).bounds)


def _captures(root: Expr) -> bool:
    return any(n.kind == "capture" for n in ir.walk(root))


def _outside(node: Expr) -> bool:
    """Whether a part is computed outside: it reads a captured tensor, or is float work on batch and head alone."""
    if not node.args or node.dtype == I64 or ir.depends_on(node, SCORE):
        return False
    axes = set(ir.axes_of(node))
    if {"q", "k"} <= axes:
        return False
    computed = node.dtype == F32 and node.kind != F32  # a cast costs nothing inside
    return _captures(node) or (computed and bool(axes) and axes <= set("bh"))


def _inside(root: Expr, parts: Partition) -> Expr:
    done: dict[Expr, Expr] = {}

    def visit(node: Expr) -> Expr:
        if node not in done:
            done[node] = _visited(node)
        return done[node]

    def _visited(node: Expr) -> Expr:
        if not node.args:
            return node
        if not ir.depends_on(node, SCORE) and node.dtype != I64:
            return _beside_score(node, parts)
        if node.kind == "gather":
            raise ScoreGather(node)
        args = tuple(visit(a) for a in node.args)
        return ir.intern(node.kind, node.dtype, args, node.value, node.dims)

    return visit(root)


def _beside_score(node: Expr, parts: Partition) -> Expr:
    """A part that needs no score, over operands if the kernel can compute it so, else as one operand."""
    trial = Partition(parts.stored, list(parts.operands))
    candidate = _with_operands(node, trial)
    if candidate is None or not computes(candidate):
        return parts.value(node)
    parts.operands = trial.operands
    return candidate


def _with_operands(node: Expr, parts: Partition) -> Expr | None:
    if _outside(node):
        return parts.value(node)
    if node.kind == "gather":
        return None
    limited = _limited(node, parts)
    if limited is not None:
        return limited
    args = [_with_operands(a, parts) for a in node.args]
    if any(a is None for a in args):
        return None
    rebuilt = tuple(a for a in args if a is not None)
    return ir.intern(node.kind, node.dtype, rebuilt, node.value, node.dims) if rebuilt else node


ORDER = ("ge", "gt", "le", "lt")


def _limited(node: Expr, parts: Partition) -> Expr | None:
    """position >= limit with the captured limit clamped, which shows the same pairs, and with which nothing overflows.
    """
    if node.kind not in ORDER or node.args[0].dtype not in (I32, I64):
        return None
    position, limit = sorted(node.args, key=_captures)
    position = position.args[0] if position.kind == "i64" else position
    axes = set(ir.axes_of(limit))
    if _captures(position) or not _captures(limit) or {"q", "k"} <= axes:
        return None
    if position.dtype != I32 or magnitude(position) >= VALUE_LIMIT:
        return None
    least, most = (ir.const(n, limit.dtype) for n in (-VALUE_LIMIT, VALUE_LIMIT))
    operand = parts.operand(ir.cast(make("min", make("max", limit, least), most), I32), I32)
    ordered = (operand, position) if node.args[1] is not limit else (position, operand)
    return ir.intern(node.kind, BOOL, ordered)
