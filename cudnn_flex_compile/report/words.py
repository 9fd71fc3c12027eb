"""A program in words: its score in infix, its mask as bounds.

Knows nothing of reports or of tables.
"""

from collections.abc import Sequence

from cudnn_flex_compile.scoremod.ir import TRUE, Expr, Program
from cudnn_flex_compile.scoremod.masks.bound import Bound
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.text import infix


def describe_score(program: Program) -> str:
    """The score in infix: `tanh(score / 20) * 20`."""
    return infix(program.score)


def describe_mask(program: Program) -> str:
    """The mask in words where it has a name ("causal", "window 256"), else its bounds and what is left, in infix."""
    form = split(program.mask)
    terms = _bands(form.bounds)
    terms += [infix(bias) for bias in form.biases]
    if form.residual is not TRUE:
        terms.append(infix(form.residual))
    terms.sort(key=lambda term: term != "causal")
    return ", ".join(terms) or "none"


def _bands(bounds: Sequence[Bound]) -> list[str]:
    plain = {b.side: b.constant for b in bounds if not b.terms and b.side in ("lower", "upper")}
    if len(bounds) == len(plain) == 2 and plain["lower"] == plain["upper"] > 0:
        return [f"|q - kv| <= {plain['lower']}"]
    return [_bound(bound) for bound in bounds]


def _bound(bound: Bound) -> str:
    """Each side's inequality, solved for what people compare."""
    if bound.side == "lower" and not bound.terms and bound.constant == 0:
        return "causal"
    if bound.side == "upper" and not bound.terms and bound.constant >= 0:
        return f"window {bound.constant}"
    sign = -1 if bound.side == "start" else 1
    constant = sign * bound.constant
    terms = [(sign * factor, term) for factor, term in bound.terms]
    relation = ">=" if bound.side == "start" else "<="
    if bound.terms and constant == -1 and relation == "<=":
        relation, constant = "<", 0
    anchor = {"lower": "kv - q", "upper": "q - kv", "start": "kv", "end": "kv"}[bound.side]
    return f"{anchor} {relation} {_sum(terms, constant)}"


def _sum(terms: Sequence[tuple[int, Expr]], constant: int) -> str:
    """`a - b + 2`."""
    parts = [(sign < 0, infix(term)) for sign, term in terms]
    if constant or not parts:
        parts.append((constant < 0, str(abs(constant))))
    (negative, first), *rest = parts
    spelled = f"-{first}" if negative else first
    return spelled + "".join(f" {'-' if minus else '+'} {part}" for minus, part in rest)
