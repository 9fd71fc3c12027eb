"""The normal form of a mask: integer bounds that every visible key meets, and a residual predicate.

Knows nothing of cuDNN. A mask class is one file with `match(predicate) -> bounds | None`, listed in CLASSES.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import TRUE, Expr
from cudnn_flex_compile.scoremod.masks import band, row_interval
from cudnn_flex_compile.scoremod.masks.bound import Bound
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.simplify import simplify

Match = Callable[[Expr], tuple[Bound, ...] | None]
CLASSES: tuple[Match, ...] = (band.match, row_interval.match)


@dataclass(frozen=True, slots=True)
class MaskForm:
    """The mask is the conjunction of all bounds and the residual."""

    bounds: tuple[Bound, ...] = ()
    residual: Expr = TRUE


def conjuncts(mask: Expr) -> list[Expr]:
    if mask.kind == "and":
        return [term for arg in mask.args for term in conjuncts(arg)]
    return [] if mask is TRUE else [mask]


def split(mask: Expr) -> MaskForm:
    """The normal form of a simplified mask; what is not provably a bound stays in the residual."""
    bounds: list[Bound] = []
    residual = TRUE
    for term in conjuncts(mask):
        found = next((b for match in CLASSES if (b := match(term)) is not None), None)
        if found is None:
            residual = simplify(make("and", residual, term))
        else:
            bounds.extend(found)
    return MaskForm(tightest(bounds), residual)


def tightest(bounds: list[Bound]) -> tuple[Bound, ...]:
    """One bound for each side and set of terms, the tightest constant winning; in a fixed order."""
    best: dict[tuple[str, tuple[tuple[int, Expr], ...]], Bound] = {}
    for bound in bounds:
        key = (bound.side, bound.terms)
        if key not in best or bound.constant < best[key].constant:
            best[key] = bound
    return tuple(sorted(best.values(), key=lambda b: Bound.SIDES.index(b.side)))


def as_predicate(form: MaskForm) -> Expr:
    """The mask again, as one expression."""
    mask = form.residual
    for bound in form.bounds:
        mask = make("and", mask, bound.predicate())
    return simplify(mask) if mask is not ir.TRUE else mask
