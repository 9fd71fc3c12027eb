"""Divides a mask of constant bounds, or a union of such masks, into disjoint boxes: rows x columns under one band.

engine/plans/box_plan.py runs one plan for each box. A plan skips the tiles beyond `q' >= k'` and `k' + u >= q'`, where
rows and columns are counted from the box's own corner; this file knows nothing else of cuDNN. Examples:

    A prefix-LM is a causal box and the square above its diagonal.
    Sink tokens beside a window are the window and a strip of columns.
    The backward skips no tiles for `q + c >= kv`. There this mask is two boxes: the columns before c, and those from c
        on, whose own diagonal starts at their corner.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import Expr, Program
from cudnn_flex_compile.scoremod.masks.bound import Bound
from cudnn_flex_compile.scoremod.masks.form import MaskForm, as_predicate, conjuncts, split
from cudnn_flex_compile.scoremod.masks.linear import KV, Q

MAX_BOXES = 4  # boxes of one mask


@dataclass(frozen=True, slots=True)
class Box:
    """Rows [top, bottom) and columns [left, right) where q - kv + lower >= 0 and kv - q + upper >= 0, if given."""

    top: int
    bottom: int
    left: int
    right: int
    lower: int | None = None
    upper: int | None = None

    @property
    def empty(self) -> bool:
        gap = self.lower is not None and self.upper is not None and self.lower + self.upper < 0
        return gap or self.top >= self.bottom or self.left >= self.right

    def with_bound(self, bound: Bound) -> "Box":
        c = bound.constant
        match bound.side:
            case "start":
                return replace(self, left=max(self.left, -c))
            case "end":
                return replace(self, right=min(self.right, c + 1))
            case "lower":
                return replace(self, lower=c if self.lower is None else min(self.lower, c))
            case "upper":
                return replace(self, upper=c if self.upper is None else min(self.upper, c))
            case side:
                raise ValueError(f"a box has no bound {side!r}: ask `in_boxes` first")

    def tight(self) -> "Box":
        """The same pairs in the smallest rows and columns, without bounds that always hold there."""
        box, before = self, None
        while box != before and not box.empty:
            before = box
            if box.lower is not None:
                box = replace(box, top=max(box.top, box.left - box.lower), right=min(box.right, box.bottom + box.lower))
            if box.upper is not None:
                left, bottom = max(box.left, box.top - box.upper), min(box.bottom, box.right + box.upper)
                box = replace(box, left=left, bottom=bottom)
        if box.empty:
            return box
        if box.lower is not None and box.top - (box.right - 1) + box.lower >= 0:
            box = replace(box, lower=None)
        if box.upper is not None and box.left - (box.bottom - 1) + box.upper >= 0:
            box = replace(box, upper=None)
        return box

    def bounds(self) -> tuple[Bound, ...]:
        """The bounds that hold of a pair exactly if it is in the box."""
        found = [Bound("start", -self.left), Bound("end", self.right - 1)]
        found += [Bound("lower", self.lower)] if self.lower is not None else []
        return tuple(found + ([Bound("upper", self.upper)] if self.upper is not None else []))

    def local(self) -> tuple[int | None, int | None]:
        """The constants `lower` and `upper`, with rows and columns counted from the corner."""
        shift = self.top - self.left
        return (
            None if self.lower is None else self.lower + shift,
            None if self.upper is None else self.upper - shift,
        )

    def program(self, score: Expr) -> Program:
        """The program of a plan over these rows and columns alone."""
        moved = {
            Q: Q + ir.const(self.top, ir.I32) if self.top else Q,
            KV: KV + ir.const(self.left, ir.I32) if self.left else KV,
        }
        lower, upper = self.local()
        bounds = [Bound("lower", lower)] if lower is not None else []
        bounds += [Bound("upper", upper)] if upper is not None else []
        return ir.program(ir.rebuild(score, moved), as_predicate(MaskForm(tuple(bounds))))

    def pairs(self) -> int:
        """The number of visible pairs, approximately."""
        full = (self.bottom - self.top) * (self.right - self.left)
        lower, upper = self.local()
        if lower is not None:
            full -= _triangle(self.bottom - self.top, self.right - self.left - 1 - lower)
        if upper is not None:
            full -= _triangle(self.right - self.left, self.bottom - self.top - 1 - upper)
        return max(full, 0)


def _triangle(across: int, leg: int) -> int:
    """The number of pairs beyond a diagonal, of which the first line has `leg`, and each next line one less."""
    last = max(0, leg - across)
    return (leg * (leg + 1) - last * (last + 1)) // 2 if leg > 0 else 0


def in_boxes(bound: Bound) -> bool:
    """Whether a box can have this bound: a constant one, on one of the sides that `Box.with_bound` knows."""
    return not bound.terms and bound.side in ("start", "end", "lower", "upper")


def pruned(program: Program, lengths: tuple[int, int]) -> Program:
    """The program without constant bounds that always hold at these lengths of q and kv."""
    form = split(program.mask)
    box = Box(0, lengths[0], 0, lengths[1])
    kept = tuple(b for b in form.bounds if not in_boxes(b) or box.with_bound(b).tight() != box)
    return program if kept == form.bounds else ir.program(program.score, as_predicate(replace(form, bounds=kept)))


def boxes(form: MaskForm, lengths: tuple[int, int]) -> list[Box] | None:
    """Disjoint boxes that make up the mask, the largest first; None if it is no union of few boxes."""
    if form.biases or not all(map(in_boxes, form.bounds)):
        return None
    found = [Box(0, lengths[0], 0, lengths[1])]
    for bound in form.bounds:
        found = [box.with_bound(bound) for box in found]
    for clause in conjuncts(form.residual):
        choices = [_as_bounds(c) for c in _disjuncts(clause)]
        if any(c is None for c in choices) or len(found) * len(choices) > 2 * MAX_BOXES:
            return None
        found = [_meet(box, c) for box in found for c in choices if c is not None]
    found = sorted((b for b in (box.tight() for box in found) if not b.empty), key=lambda b: -b.pairs())
    apart: list[Box] = []
    for box in found:
        pieces = [box]
        for earlier in apart:
            pieces = [piece for whole in pieces for piece in _minus(whole, earlier)]
        apart += pieces
    return apart if 0 < len(apart) <= MAX_BOXES else None


def _disjuncts(clause: Expr) -> list[Expr]:
    return [x for a in clause.args for x in _disjuncts(a)] if clause.kind == "or" else [clause]


def _as_bounds(choice: Expr) -> tuple[Bound, ...] | None:
    form = split(choice)
    return form.bounds if form.only_bounds and all(map(in_boxes, form.bounds)) else None


def _meet(box: Box, bounds: Iterable[Bound]) -> Box:
    for bound in bounds:
        box = box.with_bound(bound)
    return box


def _minus(box: Box, other: Box) -> list[Box]:
    """The pairs of a box that are not in the other, as disjoint boxes."""
    inside = _meet(replace(box, top=max(box.top, other.top), bottom=min(box.bottom, other.bottom)), other.bounds())
    if inside.tight().empty:
        return [box]
    found = [replace(box, bottom=min(box.bottom, other.top)), replace(box, top=max(box.top, other.bottom))]
    rest = replace(box, top=max(box.top, other.top), bottom=min(box.bottom, other.bottom))
    for bound in other.bounds():
        found.append(rest.with_bound(bound.opposite()))
        rest = rest.with_bound(bound)
    return [b for b in (piece.tight() for piece in found) if not b.empty]


def unshifted(found: Iterable[Box]) -> list[Box]:
    """The same pairs in boxes whose lower bound, if any, starts at their corner."""
    result: list[Box] = []
    for box in found:
        lower = box.local()[0]
        if not lower:
            result.append(box)
            continue
        middle = box.left + lower
        sides = replace(box, left=middle), replace(box, right=middle)
        result += [b for b in (side.tight() for side in sides) if not b.empty]
    return result
