"""A `Bound` is one integer inequality of a mask, between a kv column and constants, operands or the query row.

It imports the expressions of scoremod alone: solve.py finds bounds, and strategies write them into graphs. The four
sides are told apart in this folder and in engine/graph/strategies; whoever else reads a bound asks it (`diagonal`,
`at_most`, `limit`).
"""

from dataclasses import dataclass

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import I32, Expr
from cudnn_flex_compile.scoremod.masks.linear import KV, Linear, Q
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.ranges import INT32_LIMIT, magnitude

# The factors of q and kv in a bound's anchor, by side. Bounds are kept in this order.
SIDES = {"start": (0, 1), "end": (0, -1), "lower": (1, -1), "upper": (-1, 1)}
SIDE_OF = {factors: side for side, factors in SIDES.items()}


@dataclass(frozen=True, slots=True)
class Bound:
    """`anchor + constant + sum(sign * term) >= 0`, where the anchor is, by side:

        lower   q - kv      (causal: constant 0)
        upper   kv - q      (window of w keys behind: constant w)
        start   kv          (first key: constant -first)
        end     -kv         (last key: constant last)

    The terms are scalars or operands that do not vary along kv.
    """

    side: str
    constant: int
    terms: tuple[tuple[int, Expr], ...] = ()

    @property
    def diagonal(self) -> bool:
        """Whether the limit moves with the query row."""
        return SIDES[self.side][0] != 0

    @property
    def at_most(self) -> bool:
        """Whether the bound is `kv <= limit`; if not, it is `kv >= limit`."""
        return SIDES[self.side][1] < 0

    @property
    def anchor(self) -> list[tuple[int, Expr]]:
        """The indices in the sum, each with its sign, and times its factor where this is not 1."""
        factors = zip((Q, KV), SIDES[self.side], strict=True)
        return [(1 if n > 0 else -1, x if abs(n) == 1 else x * ir.const(abs(n), I32)) for x, n in factors if n]

    def limit(self) -> Linear:
        """The last kv column that the bound lets a query row see if it is `at_most`, else the first one."""
        form = Linear({Q: SIDES[self.side][0]}, self.constant)
        for sign, term in self.terms:
            form = form.plus(Linear({term: sign}))
        return form.plus(Linear()).times(1 if self.at_most else -1)

    def opposite(self) -> "Bound":
        """The bound of the pairs that this one hides: x + c < 0 is -x - c - 1 >= 0."""
        across, along = SIDES[self.side]
        terms = tuple((-sign, term) for sign, term in self.terms)
        return Bound(SIDE_OF[-across, -along], -self.constant - 1, terms)

    def predicate(self) -> Expr:
        """The bound as people write it: q + 2 >= kv, kv + 64 >= q, kv >= 3, 9 >= kv."""
        if not self.diagonal and not self.terms:
            last = ir.const(self.constant if self.at_most else -self.constant, I32)
            return make("ge", last, KV) if self.at_most else make("ge", KV, last)
        # Sums begin with an index: cuDNN refuses a sum of operands and constants alone.
        ahead, behind = ([index for own, index in self.anchor if own == sign] for sign in (1, -1))
        near, far = (ahead[0], behind[0] if behind else None) if ahead else (-behind[0], None)
        if self.constant:
            near = near + ir.const(self.constant, I32)
        for sign, term in self.terms:
            near = near + term if sign > 0 else near - term
        return make("ge", near, ir.const(0, I32) if far is None else far)


def bound_of(form: Linear) -> Bound | None:
    """The bound that `form >= 0` is, if it is one."""
    side = SIDE_OF.get((form.factors.get(Q, 0), form.factors.get(KV, 0)))
    terms = [(factor, atom) for atom, factor in form.factors.items() if atom not in (Q, KV)]
    plain = all(abs(f) == 1 and atom.kind in ("scalar", "operand") and "k" not in atom.dims for f, atom in terms)
    if side is None or not plain:
        return None
    terms.sort(key=lambda t: (t[1].kind, str(t[1].value)))
    bound = Bound(side, form.constant, tuple(terms))
    return bound if magnitude(bound.predicate()) <= INT32_LIMIT else None
