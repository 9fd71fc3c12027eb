"""Lowers any score_mod under any legal predicate: one select by the whole mask, and every tile is computed.

All of the mask is one predicate, its bounds included: a graph with selects of both strategies has dropped an `or`.
"""

from typing import TYPE_CHECKING, Any

from cudnn_flex_compile.engine.graph.lowering import Lowering
from cudnn_flex_compile.engine.graph.strategies.chained import FILL
from cudnn_flex_compile.engine.graph.strategies.scores import backward_writer, biased, legal, legal_backward
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.scoremod.ir import F32, GRAD, TRUE, Program
from cudnn_flex_compile.scoremod.learned import position
from cudnn_flex_compile.scoremod.masks.form import as_predicate, split

if TYPE_CHECKING:
    from cudnn_flex_compile.engine.graph.emit import Emitter

NAME = "dense"


def lower(program: Program, training: bool) -> Lowering | Reason:
    form = split(program.mask)
    score, mask = biased(program), legal(as_predicate(form.without_biases()))
    gradient = legal_backward(program) if training else GRAD
    for found in (score, mask, gradient):
        if isinstance(found, Reason):
            return found

    def write(emitter: "Emitter") -> Any:
        modified = emitter.emit(score)  # pyright: ignore[reportArgumentType]
        if mask is TRUE:
            return modified
        visible = emitter.emit(mask)  # pyright: ignore[reportArgumentType]
        return emitter.node("where", F32, visible, modified, emitter.inputs.constants[FILL])

    leaves, backward = (score, mask, gradient, FILL), backward_writer(gradient)  # pyright: ignore
    return Lowering(NAME, {}, write, backward, leaves, position(program))  # pyright: ignore
