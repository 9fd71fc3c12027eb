"""Guards programs against what cuDNN's backward does in the tile columns beyond the last key.

Knows nothing of plans. There the raw score is -inf and goes through the score_mod: where that gives no -inf, or a
derivative that is not finite, the backward multiplies it with a zero and the NaN spreads over the whole row
(measured on an H200, cuDNN 9.19: x * x, -x, sin(x), silu(x) at length 1000).
"""

import math

import torch

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.derive import NoDerivative, derive
from cudnn_flex_compile.scoremod.interpret import TORCH_DTYPE, const_tensor, evaluate
from cudnn_flex_compile.scoremod.ir import F32, GRAD, I32, SCORE, Expr, Program
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.simplify import simplify

TILE = 128


def guarded(program: Program, columns: int) -> Program:
    """The same program for columns below `columns`; beyond, the score_mod sees 0 and the score is masked."""
    inside = make("ge", ir.const(columns - 1, I32), ir.index("k"))
    score = ir.rebuild(program.score, {SCORE: make("where", inside, SCORE, ir.const(0.0, F32))})
    return ir.program(score, simplify(make("and", program.mask, inside)))


def needs_guard(program: Program, columns: int) -> bool:
    """Whether there are such columns and the program does not take -inf to -inf with a finite derivative."""
    if columns % TILE == 0 or program.score is SCORE:
        return False
    if any(n.kind == "operand" and "k" in n.dims for n in ir.walk(program.score, program.mask)):
        return True
    try:
        gradient = derive(program.score)
    except NoDerivative:
        return False
    value = float(_at_the_end(program.score))
    slope = 0.0 if gradient is None else float(_at_the_end(gradient))
    return value != -math.inf or not math.isfinite(slope)


def _at_the_end(root: Expr) -> torch.Tensor:
    """The value at a raw score of -inf and a gradient of 0; everything else is 1."""

    def leaf(node: Expr) -> torch.Tensor:
        if node.kind == "const":
            return const_tensor(node)
        special = {SCORE: -math.inf, GRAD: 0.0}
        return torch.full((), special.get(node, 1), dtype=TORCH_DTYPE[node.dtype])

    return evaluate(root, leaf)
