"""The parts of a mask in words: "causal", "window 256", or an inequality that is solved for the index that it bounds.

Reports print these words. A side of `Bound` needs no case here, unless it has a name.
"""

from collections.abc import Sequence

from cudnn_flex_compile.scoremod.ir import TRUE, Expr
from cudnn_flex_compile.scoremod.masks.bound import Bound
from cudnn_flex_compile.scoremod.masks.form import MaskForm
from cudnn_flex_compile.scoremod.text import infix


def words(form: MaskForm) -> list[str]:
    """Each part of a mask that has a name by this name ("causal"), the others in infix; none without a mask."""
    terms = _bands(form.bounds)
    terms += [infix(bias) for bias in form.biases]
    if form.residual is not TRUE:
        terms.append(infix(form.residual))
    return sorted(terms, key=lambda term: term != "causal")


def _bands(bounds: Sequence[Bound]) -> list[str]:
    plain = {b.side: b.constant for b in bounds if not b.terms and b.side in ("lower", "upper")}
    if len(bounds) == len(plain) == 2 and plain["lower"] == plain["upper"] > 0:
        return [f"|q - kv| <= {plain['lower']}"]
    return [_bound(bound) for bound in bounds]


def _bound(bound: Bound) -> str:
    """The inequality of a bound: indices on the left, numbers and terms on the right."""
    if bound.side == "lower" and not bound.terms and bound.constant == 0:
        return "causal"
    if bound.side == "upper" and not bound.terms and bound.constant >= 0:
        return f"window {bound.constant}"
    sign = 1 if any(own < 0 for own, _ in bound.anchor) else -1  # kv >= 3, and -kv + 9 >= 0 as kv <= 9
    constant = sign * bound.constant
    terms = [(sign * factor, term) for factor, term in bound.terms]
    relation = ">=" if sign < 0 else "<="
    if bound.terms and constant == -1 and relation == "<=":
        relation, constant = "<", 0
    anchor = sorted(((-sign * own, index) for own, index in bound.anchor), key=lambda term: -term[0])
    return f"{_sum(anchor, 0)} {relation} {_sum(terms, constant)}"


def _sum(terms: Sequence[tuple[int, Expr]], constant: int) -> str:
    """The sum of signed terms and a constant: `a - b + 2`."""
    parts = [(sign < 0, infix(term)) for sign, term in terms]
    if constant or not parts:
        parts.append((constant < 0, str(abs(constant))))
    (negative, first), *rest = parts
    spelled = f"-{first}" if negative else first
    return spelled + "".join(f" {'-' if minus else '+'} {part}" for minus, part in rest)
