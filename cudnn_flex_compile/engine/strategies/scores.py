"""What the score_mod strategies share: legal score and backward expressions of a program.

Knows nothing of masks.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.derive import NoDerivative, derive
from cudnn_flex_compile.scoremod.ir import GRAD, Expr, Program
from cudnn_flex_compile.scoremod.legalize import Illegal, legalize, unsupported
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.simplify import simplify

if TYPE_CHECKING:
    from cudnn_flex_compile.engine.lower import Emitter


def legal(root: Expr) -> Expr | Reason:
    """`root` in legal forms, or which op has none."""
    try:
        done = legalize(root)
    except Illegal as error:
        return Reason(Code.ILLEGAL_OP, str(error))
    missing = unsupported(done)
    return done if missing is None else Reason(Code.ILLEGAL_OP, f"{missing} has no cuDNN op")


def biased(program: Program) -> Expr | Reason:
    """The legal score, with the mask's biases added: what is hidden becomes -inf."""
    score = program.score
    for bias in split(program.mask).biases:
        score = score + bias
    return legal(score)


def legal_backward(program: Program) -> Expr | Reason:
    """The gradient of the raw score; GRAD itself where it passes unchanged."""
    try:
        gradient = derive(program.score)
    except NoDerivative as error:
        return Reason(Code.NO_BACKWARD, str(error))
    if gradient is None or not ir.depends_on(gradient, GRAD):
        return Reason(Code.NO_BACKWARD, "the score_mod's result does not depend on the score")
    return legal(simplify(gradient))


def backward_writer(gradient: Expr) -> "Callable[[Emitter], Any] | None":
    return None if gradient is GRAD else lambda emitter: emitter.emit(gradient)
