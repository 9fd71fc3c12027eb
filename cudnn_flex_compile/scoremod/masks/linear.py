"""Linear forms of integer expressions: a constant plus whole multiples of atoms.

Knows nothing of masks. Exact where no step of the original overflows int32, which `ranges.magnitude` proves.
"""

from dataclasses import dataclass, field

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import I32, Expr
from cudnn_flex_compile.scoremod.ranges import INT32_LIMIT, VALUE_LIMIT, magnitude

Q, KV = ir.index("q"), ir.index("k")


@dataclass(frozen=True, slots=True)
class Linear:
    """sum(factor * atom) + constant."""

    factors: dict[Expr, int] = field(default_factory=dict[Expr, int])
    constant: int = 0

    def plus(self, other: "Linear", sign: int = 1) -> "Linear":
        factors = dict(self.factors)
        for atom, factor in other.factors.items():
            factors[atom] = factors.get(atom, 0) + sign * factor
        kept = {atom: factor for atom, factor in factors.items() if factor}
        return Linear(kept, self.constant + sign * other.constant)

    def times(self, factor: int) -> "Linear":
        return Linear({a: f * factor for a, f in self.factors.items() if factor}, self.constant * factor)


def linear(node: Expr) -> Linear:
    """The linear form of an I32 expression; whatever is not a sum or a multiple is an atom."""
    if node.kind == "const":
        return Linear(constant=int(node.value or 0))
    if node.kind in ("add", "sub"):
        return linear(node.args[0]).plus(linear(node.args[1]), 1 if node.kind == "add" else -1)
    if node.kind == "neg":
        return linear(node.args[0]).times(-1)
    if node.kind == "mul" and node.args[1].kind == "const":
        return linear(node.args[0]).times(int(node.args[1].value or 0))
    return Linear({node: 1})


def nonnegative_form(predicate: Expr) -> Linear | None:
    """L with `predicate` equivalent to L >= 0: for `a >= b` and, on integers, `a > b`."""
    if predicate.kind not in ("ge", "gt") or predicate.args[0].dtype != I32:
        return None
    form = linear(predicate.args[0]).plus(linear(predicate.args[1]), -1)
    exact = all(magnitude(side) <= INT32_LIMIT for side in predicate.args)
    form = form if predicate.kind == "ge" else form.plus(Linear(constant=1), -1)
    return form if exact and abs(form.constant) <= VALUE_LIMIT // 2 else None
