"""Guards programs against three ways in which cuDNN's backward computes a score_mod wrongly.

candidates.py builds guarded programs where `needs_guard` says so, or where the plain ones fail. The faults were
measured on an H200 with cuDNN 9.19:

- In the tile rows and columns beyond the last query and key the raw score is -inf, and goes through the score_mod.
  Where its result is not -inf, or its derivative is not finite, the backward multiplies it with a zero, and the NaN
  spreads over whole rows of dQ and dK (x * x, -x, sin(x), silu(x) at length 1000; right at 1024). With a captured
  tensor along kv, rows of very low scores fail the same way at lengths that are 64 modulo 128.
- There, too, a captured tensor is read beyond its end, and the contents of that memory go through the score_mod.
  Weights of rows beyond the last query are multiplied with zeros. So a NaN in that memory, or a score that grows there
  until its weight overflows (slopes[h] * (kv - q), where the score_mod sees 0), makes dV NaN. Scores of -inf have
  weights of 0.
- Where the gradient reads the score_mod's very result (sigmoid(x), |x|), dV is off by 200x. A select after the result
  mends it.
"""

import math

import torch

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import TORCH_DTYPE, const_tensor, evaluate
from cudnn_flex_compile.scoremod.ir import F32, GRAD, I32, SCORE, Expr, Program
from cudnn_flex_compile.scoremod.learned import with_bias, without_bias
from cudnn_flex_compile.scoremod.masks.form import as_predicate, split
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.simplify import simplify
from cudnn_flex_compile.scoremod.switches import on

TILE = 128


def _below(lengths: tuple[int, int]) -> tuple[Expr, Expr]:
    rows, columns = (make("ge", ir.const(n - 1, I32), ir.index(a)) for n, a in zip(lengths, "qk", strict=True))
    return rows, columns


def guarded(program: Program, lengths: tuple[int, int]) -> Program:
    """The same program below `lengths` of q and kv; beyond, the score_mod sees 0, and its result is -inf."""
    rows, columns = _below(lengths)
    zero, form = ir.const(0.0, F32), split(program.mask)
    inside = make("where", columns, make("where", rows, SCORE, zero), zero)
    score, learned = without_bias(program.score)
    score = ir.rebuild(score, {SCORE: inside})
    score = make("where", rows, form.added_to(score), ir.const(-math.inf, F32))
    shown = as_predicate(form.without_biases())
    return ir.program(with_bias(score, learned), simplify(make("and", shown, columns)))


def _is_read_beyond(node: Expr) -> bool:
    """Whether a node reads memory beyond the lengths that may hold NaNs; integers there do no harm."""
    return node.kind == "operand" and node.dtype == F32 and bool({"q", "k"} & set(node.dims))


def needs_guard(program: Program, gradient: Expr, lengths: tuple[int, int]) -> bool:
    """Whether the backward of a legal program is known to go wrong without the guard.

    Args:
        program: score and mask, in legal forms.
        gradient: the gradient of the raw score, in legal forms.
        lengths: the lengths of q and kv.
    """
    if program.score is SCORE:
        return False
    if split(program.mask).unmasked and ir.depends_on(gradient, program.score) and on("results guarded"):
        return True
    if all(n % TILE == 0 for n in lengths) or not on("ends guarded"):
        return False
    operands = [n for n in ir.walk(program.score, program.mask) if n.kind == "operand"]
    if any("k" in n.dims or _is_read_beyond(n) for n in operands):
        return True
    return float(_at_the_end(program.score)) != -math.inf or not math.isfinite(float(_at_the_end(gradient)))


def _at_the_end(root: Expr) -> torch.Tensor:
    """The value of an expression at a raw score of -inf and a gradient of 0, where every other leaf is 1."""

    def leaf(node: Expr) -> torch.Tensor:
        if node.kind == "const":
            return const_tensor(node)
        special = {SCORE: -math.inf, GRAD: 0.0}
        return torch.full((), special.get(node, 1), dtype=TORCH_DTYPE[node.dtype])

    return evaluate(root, leaf)
