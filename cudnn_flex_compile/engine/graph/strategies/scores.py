"""The legal score and backward expressions of a program, which chained.py and dense.py share."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.derive import NoDerivative, derive
from cudnn_flex_compile.scoremod.ir import F32, GRAD, GRAD_LSE, MINUS_LSE, Expr, Program
from cudnn_flex_compile.scoremod.learned import position, without_bias
from cudnn_flex_compile.scoremod.legalize import Illegal, legalize, unsupported
from cudnn_flex_compile.scoremod.masks.form import as_predicate, split
from cudnn_flex_compile.scoremod.optable import make
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


def legal_backward(program: Program, inside: Expr | None = None) -> Expr | Reason:
    """The gradient of the raw score; GRAD itself where it passes unchanged.

    Args:
        inside: None, or a predicate of the pairs at which a gradient of the log-sum-exp counts. Beside a learned bias
            it is refused: cuDNN's dBias is the gradient before that one is added (the frontend's sources, 1.32).
    """
    if inside is not None and position(program) is not None:
        return Reason(Code.UNSUPPORTED_CALL, "a score_mod's backward gives a bias no gradient of the log-sum-exp")
    try:
        gradient = derive(program.score)
    except NoDerivative as error:
        return Reason(Code.NO_BACKWARD, str(error))
    if gradient is None or not ir.depends_on(gradient, GRAD):
        return Reason(Code.NO_BACKWARD, "the score_mod's result does not depend on the score")
    if inside is not None:
        gradient = ir.rebuild(gradient, {GRAD: GRAD + _of_the_lse(program, inside)})
    found = legal(simplify(gradient))
    if isinstance(found, Reason) or found is GRAD or position(program) is None:
        return found
    return ir.rebuild(found, {GRAD: GRAD * 1.0})  # beside dBias, cuDNN takes a product as GRAD's one consumer alone


def _of_the_lse(program: Program, inside: Expr) -> Expr:
    """The term that a gradient of the log-sum-exp adds to GRAD: exp(S - LSE) * dLSE at visible pairs, else 0.

    It costs two reads for each row and an exp for each pair. (Wider values, engine/plans/widened_values.py, let cuDNN
    add it up itself, but cost copies of three tensors, and more of each product.) It reads the score before it is
    masked, and is masked by a select of its own: a gradient that reads the score_mod's very result is computed wrongly
    (engine/guards.py). The select comes last, so that an exp that overflows at a hidden pair, and entries of the rows
    beyond their end, reach nothing.
    """
    form = split(program.mask)
    score = form.added_to(program.score)
    shown = make("and", as_predicate(form.without_biases()), inside)
    return make("where", simplify(shown), make("exp", score + MINUS_LSE) * GRAD_LSE, ir.const(0.0, F32))


def backward_writer(gradient: Expr) -> "Callable[[Emitter], Any] | None":
    return None if gradient is GRAD else lambda emitter: emitter.emit(gradient)
