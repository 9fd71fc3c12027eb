"""Guarded programs beyond the last query and key: raw scores of -inf there, and captured tensors that hold NaN.

Knows nothing of cuDNN but what it does in the last tiles: every row of weights is multiplied with a zero.
"""

import math

import pytest
import torch

from cudnn_flex_compile.engine.graph.strategies.scores import biased, legal_backward
from cudnn_flex_compile.engine.guards import TILE, guarded, needs_guard
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import environment, evaluate
from cudnn_flex_compile.scoremod.ir import F32, GRAD, I32, SCORE
from cudnn_flex_compile.scoremod.masks.form import hides, split
from cudnn_flex_compile.scoremod.optable import make

LENGTHS = (5, 7)
PAIRS, ROWS, COLUMNS = (ir.operand(0, F32, dims) for dims in ("qk", "q", "k"))
Q, K = ir.index("q"), ir.index("k")
PROGRAMS = {
    "a bias": ir.program(SCORE + PAIRS),
    "a factor": ir.program(SCORE * PAIRS),
    "a row's bias": ir.program(SCORE + ROWS),
    "a row's factor": ir.program(SCORE * ROWS),
    "a column's bias": ir.program(SCORE + COLUMNS),
    "a column's factor": ir.program(SCORE * COLUMNS),
    "in one branch": ir.program(make("where", make("ge", Q, K), SCORE + PAIRS, SCORE * 2.0)),
    "bounded": ir.program(make("tanh", SCORE + PAIRS)),
    "squared": ir.program(SCORE * SCORE),
    "a mask of pairs": ir.program(SCORE, hides(PAIRS)),
    "a mask of columns": ir.program(make("sin", SCORE), hides(COLUMNS)),
    "under a diagonal": ir.program(SCORE + PAIRS, make("ge", Q, K)),
}


def beyond(program):
    """The masked score, and the gradient of the raw one for a gradient of zero, over a tile."""
    q_len, kv_len = LENGTHS
    q, kv = torch.arange(TILE, dtype=torch.int32).view(-1, 1), torch.arange(TILE, dtype=torch.int32)
    inside = (q < q_len) & (kv < kv_len)
    dims = {axis for n in ir.walk(program.score, program.mask) if n.kind == "operand" for axis in n.dims}
    there = (q < q_len if "q" in dims else True) & (kv < kv_len if "k" in dims else torch.tensor(True))
    operand = torch.where(there, 0.0 if split(program.mask).biases else 0.5, math.nan)
    score = torch.where(inside, 0.5, -math.inf)
    leaf = environment(score, {"q": q, "k": kv}, {0: operand}, {}, {}, torch.zeros_like(score))
    guard = guarded(program, LENGTHS)
    masked = torch.where(evaluate(guard.mask, leaf), evaluate(biased(guard), leaf), -math.inf)
    return masked.expand(TILE, TILE), evaluate(legal_backward(guard), leaf).expand(TILE, TILE)


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_beyond_the_ends_reaches_a_result(name):
    masked, gradient = beyond(PROGRAMS[name])
    assert (masked[:, LENGTHS[1] :] == -math.inf).all()
    assert (masked[LENGTHS[0] :] == -math.inf).all()
    assert not masked.isnan().any()
    assert not (masked == math.inf).any()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", PROGRAMS)
def test_within_the_ends_nothing_changes(name):
    program = PROGRAMS[name]
    generator = torch.Generator().manual_seed(0)
    score, operand, grad = (torch.randn(LENGTHS, generator=generator) for _ in range(3))
    if split(program.mask).biases:
        operand = torch.where(operand > 0, 0.0, -math.inf)
    indices = {"q": torch.arange(LENGTHS[0], dtype=torch.int32).view(-1, 1), "k": torch.arange(LENGTHS[1]).int()}
    leaf = environment(score, indices, {0: operand}, {}, {}, grad)
    results = []
    for which in (program, guarded(program, LENGTHS)):
        masked = torch.where(evaluate(which.mask, leaf), evaluate(biased(which), leaf), -math.inf)
        results.append((masked, evaluate(legal_backward(which), leaf)))
    (masked, gradient), (guarded_masked, guarded_gradient) = results
    torch.testing.assert_close(guarded_masked.expand(LENGTHS), masked.expand(LENGTHS), rtol=0, atol=0)
    torch.testing.assert_close(guarded_gradient.expand(LENGTHS), gradient.expand(LENGTHS))


@pytest.mark.parametrize("operand", [PAIRS, ROWS, COLUMNS])
def test_floats_along_an_axis_need_a_guard(operand):
    program = ir.program(SCORE + operand, make("ge", Q, K))
    assert needs_guard(program, GRAD, (100, 100))
    assert not needs_guard(program, GRAD, (128, 256))


def test_limits_of_rows_need_none():
    mask = make("gt", ir.operand(0, I32, "bq"), K)
    assert not needs_guard(ir.program(SCORE, mask), GRAD, (100, 100))
