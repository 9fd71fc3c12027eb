"""`MaskForm` is the normal form of a program's mask: integer bounds, biases that hide, and a residual predicate.

Strategies, cost models and guards read masks in this form, and ask it what they decide by. How a user's mask became
these parts is the work of solve.py and partition.py.
"""

import functools
from dataclasses import dataclass

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, TRUE, Expr
from cudnn_flex_compile.scoremod.masks.bound import SIDES, Bound, bound_of
from cudnn_flex_compile.scoremod.masks.linear import nonnegative_form
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.simplify import simplify


@dataclass(frozen=True, slots=True)
class MaskForm:
    """The mask is the conjunction of all bounds, all biases and the residual.

    Attributes:
        biases: operands of 0 and -inf: visible where they are not negative. Added to a score, they hide it.
    """

    bounds: tuple[Bound, ...] = ()
    biases: tuple[Expr, ...] = ()
    residual: Expr = TRUE

    @property
    def unmasked(self) -> bool:
        """Whether a kernel selects no pairs: without bounds and residual. Biases are added to the score."""
        return not self.bounds and self.residual is TRUE

    @property
    def only_bounds(self) -> bool:
        """Whether bounds are the whole mask."""
        return self.residual is TRUE and not self.biases

    @property
    def skips_tiles(self) -> bool:
        """Whether a kernel can skip the tiles that the bounds hide: a residual has it compute every tile."""
        return self.residual is TRUE

    @property
    def reads_pairs(self) -> bool:
        """Whether a kernel computes or loads something at each pair to know which are visible."""
        return self.residual is not TRUE or any("q" in bias.dims for bias in self.biases)

    @property
    def rows_are_intervals(self) -> bool:
        """Whether each query row sees one interval of the kv columns that no bias hides."""
        return not self.reads_pairs

    def without_biases(self) -> "MaskForm":
        """The part by which a kernel selects pairs."""
        return MaskForm(self.bounds, residual=self.residual)

    def added_to(self, score: Expr) -> Expr:
        """A score with the biases added, so that -inf hides what they hide."""
        for bias in self.biases:
            score = score + bias
        return score


ZERO = ir.const(0.0, F32)


def hides(bias: Expr) -> Expr:
    """The predicate of a bias."""
    return make("ge", bias, ZERO)


def conjuncts(mask: Expr) -> list[Expr]:
    """The predicates whose conjunction a mask is; none for one that is always true."""
    if mask.kind == "and":
        return [term for arg in mask.args for term in conjuncts(arg)]
    return [] if mask is TRUE else [mask]


@functools.lru_cache(256)
def split(mask: Expr) -> MaskForm:
    """The normal form of a program's mask; what is not plainly a bound or a bias stays in the residual."""
    bounds: list[Bound] = []
    biases: list[Expr] = []
    residual = TRUE
    for term in conjuncts(mask):
        form = nonnegative_form(term)
        bound = bound_of(form) if form is not None else None
        if bound is not None:
            bounds.append(bound)
        elif term.kind == "ge" and term.args[0].kind == "operand" and term.args[1] is ZERO:
            biases.append(term.args[0])
        else:
            residual = simplify(make("and", residual, term))
    return MaskForm(tightest(bounds), tuple(biases), residual)


def tightest(bounds: list[Bound]) -> tuple[Bound, ...]:
    """One bound for each side and set of terms, the tightest constant winning; in a fixed order."""
    best: dict[tuple[str, tuple[tuple[int, Expr], ...]], Bound] = {}
    for bound in bounds:
        key = (bound.side, bound.terms)
        if key not in best or bound.constant < best[key].constant:
            best[key] = bound
    return tuple(sorted(best.values(), key=lambda b: list(SIDES).index(b.side)))


def as_predicate(form: MaskForm) -> Expr:
    """The mask again, as one expression."""
    mask = form.residual
    for part in (*map(Bound.predicate, form.bounds), *map(hides, form.biases)):
        mask = make("and", mask, part)
    return simplify(mask)
