"""A bias that takes a gradient: which part of a score it is, and where it stands in a program.

In `score = rest + bias` the gradient of the bias is that of the modified score, whatever the rest computes. So one
tensor over (q, kv) pairs stands for all captured tensors that require grad, and autograd goes on from it, outside the
kernel. A program has it as the last term, `learned(operand)`. partition.py splits scores by this file; the engine asks
it for the operand's position.
"""

import functools
from collections.abc import Callable, Set

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, SCORE, Expr, Program
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.simplify import simplify
from cudnn_flex_compile.scoremod.text import infix, parse

Parts = tuple[Expr, Expr]  # rest, bias
ZERO = ir.const(0.0, F32)
PAIRS = "qk"


class NotAdditive(Exception):
    """A captured tensor that requires grad is more than added to the score."""


def split_bias(score: Expr, learned: Set[Expr]) -> tuple[Expr, Expr | None]:
    """(rest, bias), whose sum is the score, with a bias that reads no score; (score, None) where nothing is learned.

    Args:
        score: over captures.
        learned: the captures that require grad.

    Raises:
        NotAdditive: where there is no such sum.
    """
    if not reads(score, learned):
        return score, None
    rest, bias = _separate(score, learned)
    axes = {*PAIRS, *ir.axes_of(bias)}
    taken = [t for t in _terms(rest) if not ir.depends_on(t, SCORE) and set(ir.axes_of(t)) <= axes]
    kept = [t for t in _terms(rest) if t not in taken]  # other terms that fit into the tensor cost nothing there
    return simplify(_sum(kept)), simplify(_sum([bias, *taken]))


def reads(root: Expr, leaves: Set[Expr]) -> bool:
    """Whether a gradient flows to one of the leaves. None flows through `stop`."""
    kept = ir.rebuild(root, {node: ZERO for node in ir.walk(root) if node.kind == "stop"})
    return any(node in leaves for node in ir.walk(kept))


def _terms(root: Expr) -> list[Expr]:
    match root.kind:
        case "add":
            return [term for arg in root.args for term in _terms(arg)]
        case "sub":
            return [*_terms(root.args[0]), *(-term for term in _terms(root.args[1]))]
        case _:
            return [root]


def _sum(terms: list[Expr]) -> Expr:
    return functools.reduce(lambda total, term: total + term, terms, ZERO)


def _separate(node: Expr, learned: Set[Expr]) -> Parts:
    if not reads(node, learned):
        return node, ZERO
    if not ir.depends_on(node, SCORE):
        return ZERO, node
    if node.kind not in RULES:
        raise NotAdditive(infix(node))
    return RULES[node.kind](node, learned)


def _each(node: Expr, learned: Set[Expr]) -> Parts:
    """(x + a) op (y + b) -> (x op y) + (a op b), for sums, differences and signs"""
    parts = [_separate(arg, learned) for arg in node.args]
    rest, bias = (make(node.kind, *side) for side in zip(*parts, strict=True))
    return rest, bias


def _scaled(node: Expr, learned: Set[Expr]) -> Parts:
    """(x + a) * c -> x * c + a * c;  (x + a) / c -> x / c + a / c"""
    first, second = node.args
    turned = node.kind == "mul" and reads(second, learned)
    sum_, factor = (second, first) if turned else (first, second)
    if reads(factor, learned) or ir.depends_on(factor, SCORE):
        raise NotAdditive(infix(node))
    rest, bias = _separate(sum_, learned)
    return make(node.kind, rest, factor), make(node.kind, bias, factor)


def _chosen(node: Expr, learned: Set[Expr]) -> Parts:
    """where(p, x + a, y + b) -> where(p, x, y) + where(p, a, b)"""
    condition, *choices = node.args
    if reads(condition, learned) or ir.depends_on(condition, SCORE):
        raise NotAdditive(infix(node))
    parts = [_separate(choice, learned) for choice in choices]
    rest, bias = (make("where", condition, *side) for side in zip(*parts, strict=True))
    return rest, bias


RULES: dict[str, Callable[[Expr, Set[Expr]], Parts]] = {
    "add": _each, "sub": _each, "neg": _each, "mul": _scaled, "div": _scaled, "where": _chosen,
}  # fmt: skip


def with_bias(score: Expr, operand: Expr | None) -> Expr:
    """The score of a program with that learned operand, if there is one."""
    return score if operand is None else score + make("learned", operand)


def without_bias(score: Expr) -> tuple[Expr, Expr | None]:
    """The score of a program without its learned operand, and this operand."""
    if score.kind == "add" and score.args[1].kind == "learned":
        return score.args[0], score.args[1].args[0]
    return score, None


def position(program: Program) -> int | None:
    """The position of the learned operand among the operands, or None without one."""
    operand = without_bias(program.score)[1]
    return None if operand is None else int(operand.value or 0)


@functools.lru_cache(1024)
def position_in(program: str) -> int | None:
    """`position` in the program of this text."""
    return position(parse(program))
