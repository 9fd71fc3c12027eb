"""Expected values of sampled rows and columns of attention, in float64 and as stock precision computes them.

checks.py asks for them; compare.py says how far a plan may be off. A backward is a function of its inputs: its expected
values follow from the output and the log-sum-exp that it was given. The data of several regimes is computed at once.
"""

import functools
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from cudnn_flex_compile.engine.certify.exact import (
    EPSILON,
    EXACT,
    FUNCTION_ERROR,
    SMALLEST_STEP,
    STOCK,
    derivatives,
    exact_scores,
    gradient_of,
    modified,
    modified_gradient_of,
    products,
    relative,
    rounded,
    sizes_of_scores,
    stock_gradient,
    stock_modified_gradient,
    stock_scores,
    weights_of,
)
from cudnn_flex_compile.engine.certify.reference import Sample
from cudnn_flex_compile.engine.certify.slices import SliceData
from cudnn_flex_compile.engine.problem import Problem

Tensors = tuple[torch.Tensor, ...]


@dataclass(slots=True)
class Block:
    """The expected values of some rows [N, R, D] of one quantity.

    Attributes:
        value: the exact values, in float64.
        stock: the values in stock precision.
        step: a rounding step of each row's sum, [N, R].
        noise: the error that float32 arithmetic inside of the kernel may add, [N, R, D].
        hidden: whether no visible pair has a part in a row, which must be zero then, [N, R].
    """

    value: torch.Tensor
    stock: torch.Tensor
    step: torch.Tensor
    noise: torch.Tensor
    hidden: torch.Tensor


@dataclass(slots=True)
class LogSums:
    """Natural log-sum-exps [N, R], and the error that float32 scores may give them."""

    value: torch.Tensor
    stock: torch.Tensor
    noise: torch.Tensor


@dataclass(slots=True)
class Slopes:
    """The derivatives of a score_mod, on usual data.

    Attributes:
        error: the error that its derivative by the raw score may have, 0-d.
        change: the score's derivative by the captured tensors, in the sample's direction, [P, R, C], NaN where masked;
            None where nothing is compared.
    """

    error: torch.Tensor
    change: torch.Tensor | None


def slopes(problem: Problem, sample: Sample, given: SliceData) -> Slopes:
    """The derivatives at given data, which must be unit normal."""
    masked, slope, *changes = derivatives(sample, products(problem, given, EXACT), given.where)
    error = slope.abs().nan_to_num_(0.0, 0.0, 0.0).max().mul_(FUNCTION_ERROR)
    if sample.change is None or not changes:
        return Slopes(error, None)
    change = changes[0].masked_fill(masked == -math.inf, math.nan)
    return Slopes(error, change.view(len(given.where[0]), -1, change.shape[-1]))


def expected_rows(problem: Problem, sample: Sample, given: SliceData) -> tuple[Block, LogSums]:
    """Outputs and log-sum-exps of the rows."""
    sizes = sizes_of_scores(problem, given)
    stock, stock_lse = _stock_rows(problem, sample, given, sizes)
    pairs = exact_scores(problem, sample, given, sizes)
    lse, value = pairs.masked.logsumexp(-1, keepdim=True), given.value.to(EXACT)
    weights = weights_of(pairs.masked, lse)
    noise, hidden = relative(pairs.score_error).mul_(weights), (pairs.masked == -math.inf).all(-1)
    sums = LogSums(lse[..., 0], stock_lse[..., 0], noise.sum(-1))
    out, squares = torch.bmm(weights, value), value.square_()
    of_out = torch.bmm(noise.square_(), squares).sqrt_()
    return Block(out, stock, _step(problem, weights, squares), of_out, hidden), sums


def _stock_rows(problem: Problem, sample: Sample, given: SliceData, sizes: torch.Tensor) -> Tensors:
    masked = modified(sample, stock_scores(problem, given, sizes), given.where)
    lse = masked.logsumexp(-1, keepdim=True)
    weights = rounded(problem, weights_of(masked, lse))
    return rounded(problem, torch.bmm(weights, given.value.to(STOCK))), lse


def expected_dq(problem: Problem, sample: Sample, given: SliceData, off: torch.Tensor) -> Block:
    """dQ of the rows; `off` is the slope_error."""
    sizes = sizes_of_scores(problem, given)
    stock = torch.bmm(stock_gradient(problem, sample, given, sizes)[1], given.key.to(STOCK))
    pairs = exact_scores(problem, sample, given, sizes)
    found, key = gradient_of(problem, pairs, given, off), given.key.to(EXACT)
    hidden = (pairs.masked == -math.inf).all(-1)
    dq, squares = torch.bmm(found.scores, key), key.square_()
    noise = torch.bmm(found.noise.square_(), squares).sqrt_()
    return Block(dq, rounded(problem, stock), _step(problem, found.before, squares), noise, hidden)


def expected_columns(
    problem: Problem, sample: Sample, parts: Iterable[SliceData], off: torch.Tensor
) -> tuple[Block, Block]:  # fmt: skip
    """dK and dV of the columns of each kv head, summed over its query heads, of which each part has some."""
    seen, *found = _summed(_of_columns(problem, sample, given, off) for given in parts)
    dk, dv = (
        Block(value, rounded(problem, stock), step, noise.sqrt_(), seen == 0)
        for value, stock, step, noise in (found[:4], found[4:])
    )
    return dk, dv


def _of_columns(problem: Problem, sample: Sample, given: SliceData, off: torch.Tensor) -> Tensors:
    """Whether some row sees each column; then value, stock value, step and squared noise of dK, and those of dV."""
    heads, grad, sizes = len(given.where[0]), given.of_rows[0], sizes_of_scores(problem, given)
    weights, scores = stock_gradient(problem, sample, given, sizes)
    stock = torch.bmm(scores.mT, given.query.to(STOCK)), torch.bmm(rounded(problem, weights).mT, grad.to(STOCK))
    del weights, scores
    pairs = exact_scores(problem, sample, given, sizes)
    seen, found = (pairs.masked != -math.inf).any(-2), gradient_of(problem, pairs, given, off)
    del pairs, sizes
    of_dv = found.weights, found.weights, found.relative_error.mul_(found.weights)
    return (
        seen,
        *_column_sums(heads, given.query, stock[0], (found.scores, found.before, found.noise), problem),
        *_column_sums(heads, grad, stock[1], of_dv, problem),
    )


def _column_sums(heads: int, terms: torch.Tensor, stock: torch.Tensor, pairs: Tensors, problem: Problem) -> Tensors:
    """Value, stock value, step and squared noise of sums over all rows of P heads."""
    factor, before, noise = pairs
    terms = terms.to(EXACT)
    value, squares = torch.bmm(factor.mT, terms), terms.square_()
    of_heads = before.view(heads, -1, before.shape[2]).mT
    step = _step(problem, of_heads, squares.view(heads, -1, squares.shape[2]))
    return value, stock, step.view(len(value), -1, value.shape[1]).sum(1), torch.bmm(noise.square().mT, squares)


def expected_bias(
    problem: Problem, sample: Sample, parts: Iterable[SliceData], heads: int, sharers: int, transposed: bool
) -> Block:  # fmt: skip
    """Sampled rows, or if transposed columns, of the gradient of a learned operand, [B or 1, H or 1, Sq, Skv].

    The gradient is summed over the `sharers`, the batch entries and heads that share an entry, of which each part has
    some; each of these terms has 16 bits.
    """
    axis = -2 if transposed else -1
    seen, *of_pairs = _summed(_of_bias(problem, sample, given, heads, axis) for given in parts)
    value, stock, squares, noise = (x.mT for x in of_pairs) if transposed else of_pairs
    dtype, terms = problem.query.dtype, value.shape[2] * sharers
    step = EPSILON[dtype] * squares.sum(-1).sqrt_() + SMALLEST_STEP[dtype] * math.sqrt(terms)
    return Block(value, rounded(problem, stock), step, noise.sqrt(), seen == 0)


def _of_bias(problem: Problem, sample: Sample, given: SliceData, heads: int, axis: int) -> Tensors:
    """The number of visible pairs along an axis; then value, stock value, squared magnitude and noise of pairs. All are
    summed over the heads that share an entry.
    """
    sizes = sizes_of_scores(problem, given)
    masked = modified(sample, stock_scores(problem, given, sizes), given.where)
    stock = rounded(problem, stock_modified_gradient(masked, given)[1])
    pairs = exact_scores(problem, sample, given, sizes)
    found = modified_gradient_of(pairs, given)
    of_heads = (pairs.masked != -math.inf).any(axis), found.value, stock, found.before.square_(), found.noise.square_()
    return tuple(x.unflatten(0, (given.regimes, -1, heads)).sum(1).flatten(0, 1) for x in of_heads)


def _summed(parts: Iterable[Tensors]) -> Tensors:
    """The sum of each tensor over all parts; for booleans, whether one is true."""
    return functools.reduce(lambda total, part: tuple(map(operator.add, total, part)), parts)


def _step(problem: Problem, weights: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """The rounding step of each row of weights @ terms, whose signs may be any, from the terms' squares: [P, R]."""
    dtype, of_terms = problem.query.dtype, squares.sum(-1, keepdim=True)
    step = torch.bmm(weights.square(), of_terms).sqrt_().mul_(EPSILON[dtype])[..., 0]
    smallest = SMALLEST_STEP[dtype]
    return step.add_(of_terms.sum(1).sqrt_(), alpha=smallest) if smallest else step
