"""The backward expression of a score_mod: its vector-Jacobian product, derived symbolically.

The derivative of each op is in its row of the op table. The strategies of engine/graph call it where a call trains.
"""

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import BOOL, F32, GRAD, SCORE, Expr
from cudnn_flex_compile.scoremod.optable import TABLE


class NoDerivative(Exception):
    """An op between the score and the result has no derivative; `op` names it."""

    def __init__(self, op: str) -> None:
        super().__init__(f"{op} has no derivative in the op table")
        self.op = op


def derive(score: Expr) -> Expr | None:
    """The gradient with respect to SCORE, from GRAD with respect to `score` (reverse mode).

    None where it is zero for every input. Raises NoDerivative.
    """
    nodes = list(ir.walk(score))
    active = {SCORE}
    for node in nodes:
        if node.dtype == F32 and node.kind != "stop" and any(a in active for a in node.args):
            active.add(node)
        elif node.dtype == BOOL and any(a in active for a in node.args):
            continue  # a predicate of the score is piecewise constant: zero gradient, as in torch
    gradient: dict[Expr, Expr] = {score: GRAD}
    for node in reversed(nodes):
        if node is SCORE or node not in active or node not in gradient:
            continue
        for arg, part in zip(node.args, _partials(node, gradient[node], active), strict=True):
            if part is not None and arg in active:
                gradient[arg] = gradient[arg] + part if arg in gradient else part
    return gradient.get(SCORE) if SCORE in active else None


def _partials(node: Expr, g: Expr, active: set[Expr]) -> tuple[Expr | None, ...]:
    row = TABLE[node.kind]
    second_only = node.kind in ("clamp_min", "clamp_max", "pow") and node.args[1] in active
    if row.backward is None or second_only:
        raise NoDerivative(node.kind)
    return row.backward(g, node.args, node)
