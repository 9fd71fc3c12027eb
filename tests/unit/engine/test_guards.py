"""Guarded programs beyond the last query and key: raw scores of -inf there, and captured tensors that hold NaN.

Knows nothing of cuDNN but what it does in the last tiles: every row of weights is multiplied with a zero.
"""

import math

import pytest
import torch

from cudnn_flex_compile.engine.graph.strategies.scores import biased, legal_backward
from cudnn_flex_compile.engine.guards import TILE, ends, guarded, needs_guard
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import environment, evaluate
from cudnn_flex_compile.scoremod.ir import F32, GRAD, GRAD_LSE, I32, MINUS_LSE, SCORE
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


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("name", [*PROGRAMS, "the score"])
def test_a_gradient_of_the_log_sum_exp_reaches_nothing_beyond_the_ends(name, guard):
    """It adds nothing there, whatever its rows hold, and nothing to a gradient that it does not belong to."""
    program = PROGRAMS.get(name, ir.program())
    program = guarded(program, LENGTHS) if guard else program
    q, kv = torch.arange(TILE, dtype=torch.int32).view(-1, 1), torch.arange(TILE, dtype=torch.int32)
    inside = (q < LENGTHS[0]) & (kv < LENGTHS[1])
    score = torch.where(inside, 0.5, -math.inf)
    there = environment(score, {"q": q, "k": kv}, {0: torch.zeros(())}, {}, {}, torch.zeros_like(score))
    rows = {MINUS_LSE: -1.0, GRAD_LSE: 2.0}

    def leaf(node):
        return torch.where(q < LENGTHS[0], rows[node], math.nan) if node in rows else there(node)

    slope = evaluate(legal_backward(program), lambda n: torch.ones(()) if n is GRAD else there(n))
    found = evaluate(legal_backward(program, ends(LENGTHS)), leaf).expand(TILE, TILE)
    visible = evaluate(program.mask, there) & (evaluate(biased(program), there) != -math.inf) & inside
    expected = slope * torch.exp(evaluate(biased(program), there) - 1) * 2
    torch.testing.assert_close(
        found[: LENGTHS[0], : LENGTHS[1]],
        torch.where(visible, expected, 0.0).expand(TILE, TILE)[: LENGTHS[0], : LENGTHS[1]],
    )
    finite = slope.isfinite().expand(TILE, TILE) & ~inside
    assert not found[finite].any()
    assert found[~inside].isfinite().all() or not guard


def test_tiles_that_end_with_the_lengths_need_no_ends():
    assert ends((128, 256)) is ir.TRUE
    assert ends((128, 100)) is not ir.TRUE


def test_a_gradient_of_the_log_sum_exp_reads_the_result():
    """Of a score_mod that has no select behind it."""
    for program, expected in ((ir.program(), True), (ir.program(mask=make("ge", Q, K)), False)):
        assert needs_guard(program, legal_backward(program, ir.TRUE), (128, 128)) == expected
        assert not needs_guard(program, GRAD, (128, 128))
    columns = ir.program(SCORE, hides(COLUMNS))
    biased_score = ir.program(biased(columns), columns.mask)
    assert needs_guard(biased_score, legal_backward(columns, ir.TRUE), (128, 128))
    assert not needs_guard(biased_score, GRAD, (128, 128))


@pytest.mark.parametrize("operand", [PAIRS, ROWS, COLUMNS])
def test_floats_along_an_axis_need_a_guard(operand):
    program = ir.program(SCORE + operand, make("ge", Q, K))
    assert needs_guard(program, GRAD, (100, 100))
    assert not needs_guard(program, GRAD, (128, 256))


def test_limits_of_rows_need_none():
    mask = make("gt", ir.operand(0, I32, "bq"), K)
    assert not needs_guard(ir.program(SCORE, mask), GRAD, (100, 100))
