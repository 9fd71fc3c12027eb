"""The legal score and backward expressions of a program, which chained.py and dense.py share."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.derive import NoDerivative, derive
from cudnn_flex_compile.scoremod.ir import GRAD, Expr, Program
from cudnn_flex_compile.scoremod.learned import position, without_bias
from cudnn_flex_compile.scoremod.legalize import Illegal, legalize, unsupported
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.simplify import simplify

if TYPE_CHECKING:
    from cudnn_flex_compile.engine.graph.emit import Emitter


def legal(root: Expr) -> Expr | Reason:
    """`root` in legal forms, or a reason that names the op that has none."""
    try:
        done = legalize(root)
    except Illegal as error:
        return Reason(Code.ILLEGAL_OP, str(error))
    missing = unsupported(done)
    return done if missing is None else Reason(Code.ILLEGAL_OP, f"{missing} has no cuDNN op")


def biased(program: Program) -> Expr | Reason:
    """The legal score without the learned operand, with the mask's biases added, so that hidden pairs are -inf."""
    score, _ = without_bias(program.score)
    return legal(split(program.mask).added_to(score))


def legal_backward(program: Program) -> Expr | Reason:
    """The gradient of the raw score; GRAD itself where it passes unchanged."""
    try:
        gradient = derive(program.score)
    except NoDerivative as error:
        return Reason(Code.NO_BACKWARD, str(error))
    if gradient is None or not ir.depends_on(gradient, GRAD):
        return Reason(Code.NO_BACKWARD, "the score_mod's result does not depend on the score")
    found = legal(simplify(gradient))
    if isinstance(found, Reason) or found is GRAD or position(program) is None:
        return found
    return ir.rebuild(found, {GRAD: GRAD * 1.0})  # beside dBias, cuDNN takes a product as GRAD's one consumer alone


def backward_writer(gradient: Expr) -> "Callable[[Emitter], Any] | None":
    return None if gradient is GRAD else lambda emitter: emitter.emit(gradient)
