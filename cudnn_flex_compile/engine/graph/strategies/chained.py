"""Lowers any score_mod under integer bounds: one select for each bound ends the chain, and cuDNN skips tiles by it.

A mask with a residual predicate is for dense.py. cuDNN recognises a bound only as a select whose indices are fresh
nodes taken from the running tensor; in any other form the mask is right, but no tile is skipped.
"""

from typing import TYPE_CHECKING, Any

from cudnn_flex_compile.engine.graph.lowering import Lowering
from cudnn_flex_compile.engine.graph.strategies.scores import backward_writer, biased, legal_backward
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import BOOL, F32, GRAD, I32, Expr, Program
from cudnn_flex_compile.scoremod.learned import position
from cudnn_flex_compile.scoremod.masks.bound import Bound
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.switches import on

if TYPE_CHECKING:
    from cudnn_flex_compile.engine.graph.emit import Emitter

NAME = "chained"
INDICES = {"lower": ("q", "k"), "upper": ("k", "q"), "start": ("k", ""), "end": ("k", "")}  # left and right, by side
FILL, ZERO = ir.const(float("-inf"), F32), ir.const(0, I32)


def lower(program: Program, training: bool) -> Lowering | Reason:
    form = split(program.mask)
    if not form.skips_tiles or any(bound.side not in INDICES for bound in form.bounds):
        return Reason(Code.UNSUPPORTED_CALL, "chained takes integer bounds only")
    score = biased(program)
    gradient = legal_backward(program) if training else GRAD
    if isinstance(score, Reason) or isinstance(gradient, Reason):
        return score if isinstance(score, Reason) else gradient  # pyright: ignore[reportReturnType]

    def write(emitter: "Emitter") -> Any:
        running = emitter.emit(score)
        for bound in form.bounds:
            running = _select(emitter, running, bound)
        return running

    leaves = (score, gradient, FILL, *(leaf for bound in form.bounds for leaf in _leaves(bound)))
    return Lowering(NAME, {}, write, backward_writer(gradient), leaves, position(program))


def _leaves(bound: Bound) -> tuple[Expr, ...]:
    return ZERO, ir.const(_shift(bound), I32), *(term for _, term in bound.terms)


def _shift(bound: Bound) -> int:
    """The constant beside the index on the left of the comparison; `kv <= last` has last on the right."""
    return -bound.constant if bound.side == "end" else bound.constant


def _select(emitter: "Emitter", running: Any, bound: Bound) -> Any:
    """running where the bound holds, -inf elsewhere.

    lower: q + c >= kv;  upper: kv + c >= q;  start: kv + c >= -terms;  end: kv - c <= terms.
    """
    inputs = emitter.inputs
    near, far = INDICES[bound.side]
    left = emitter.index(near, running)
    right = emitter.index(far, running) if far else None
    shift = _shift(bound)
    strict = bound.side == "end" and shift == 1  # kv < end, in one node
    turned = bound.side == "upper" and on("diagonal turned")  # cuDNN takes a plain kv >= q for causal
    if (shift or turned) and not strict:
        left = emitter.node("add", I32, left, inputs.constants[ir.const(shift, I32)])
    sign_on_left = -1 if bound.side == "end" else 1
    for sign, term in bound.terms:
        tensor = emitter.emit(term)
        if right is None and sign * sign_on_left < 0:
            right = tensor
        else:
            left = emitter.node("add" if sign * sign_on_left > 0 else "sub", I32, left, tensor)
    if right is None:
        right = inputs.constants[ZERO]
    kind = "lt" if strict else "le" if bound.side == "end" else "ge"
    mask = emitter.node(kind, BOOL, left, right)
    return emitter.node("where", F32, mask, running, inputs.constants[FILL])
