"""Attention on some pairs of query rows and key columns, in float64 and as stock precision computes it.

expected.py sums these values over rows and columns; compare.py says how far a plan may be off. Tensors of pairs are
[N, S, C], where S is R rows of each of P / N heads (slices.py).
"""

import math
from dataclasses import dataclass

import torch

from cudnn_flex_compile.engine.certify.reference import Sample
from cudnn_flex_compile.engine.certify.samples import SEED
from cudnn_flex_compile.engine.certify.slices import SliceData
from cudnn_flex_compile.engine.problem import Problem

EXACT, STOCK = torch.float64, torch.float32

# A score_mod's derivative is a float32 function: it must be this exact, relative to its largest value on unit normal
# scores. (cuDNN's 1 - tanh(x)**2 is off by about 1e-6, which at x = 5 is 1% of its value.)
FUNCTION_ERROR = 2.0**-18
# Tensor cores sum products in float32 and cut off smaller bits. This error is relative to the sum of magnitudes.
SUM_ERROR = 2.0**-22
# A weight is the exponential of the difference of two float32 numbers, score and log-sum-exp, each rounded once.
ROUNDING = 2.0**-23
EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST_STEP = {torch.bfloat16: 0.0, torch.float16: 2.0**-24}
# The error of an exponent is taken to be at most this, so that the relative error of a weight stays finite.
LARGEST = 50.0


@dataclass(slots=True)
class Exact:
    """Scores in float64.

    Attributes:
        masked: modified, masked scores.
        slope: their derivative by the raw scores, 0 where masked.
        score_error: the error of a score in float32, which moves its weight by about as much, relatively.
    """

    masked: torch.Tensor
    slope: torch.Tensor
    score_error: torch.Tensor


def exact_scores(problem: Problem, sample: Sample, given: SliceData, sizes: torch.Tensor) -> Exact:
    """The exact scores of a slice; `sizes` are sizes_of scores."""
    masked, slope = masked_scores(sample, products(problem, given, EXACT), given.where)
    size = masked.abs().masked_fill_(masked == -math.inf, 0.0)
    score_error = _finite(slope.abs()).mul_(sizes * SUM_ERROR).add_(size, alpha=2 * ROUNDING)
    return Exact(masked, slope, score_error)


def stock_scores(problem: Problem, given: SliceData, sizes: torch.Tensor) -> torch.Tensor:
    """Raw scores as stock precision has them, summed in another order, the same one in all regimes.

    `sizes` are sizes_of scores.
    """
    generator = torch.Generator(sizes.device).manual_seed(SEED)
    one = sizes.new_empty((len(sizes) // given.regimes, *sizes.shape[1:]))
    noise = one.uniform_(-SUM_ERROR, SUM_ERROR, generator=generator).repeat(given.regimes, 1, 1)
    return products(problem, given, STOCK).addcmul_(noise, sizes)


def products(problem: Problem, given: SliceData, dtype: torch.dtype) -> torch.Tensor:
    """Raw scores, computed in `dtype`."""
    return torch.bmm(given.query.to(dtype), given.key.to(dtype).mT).mul_(problem.scale)


def sizes_of(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The sum of magnitudes of each entry of left @ right.mT, in float32, since it only bounds errors."""
    return torch.bmm(left.to(torch.float32).abs_(), right.to(torch.float32).abs_().mT)


def sizes_of_scores(problem: Problem, given: SliceData) -> torch.Tensor:
    return sizes_of(given.query, given.key).mul_(abs(problem.scale))


def modified(sample: Sample, scores: torch.Tensor, where: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The modified, masked scores."""
    return sample.masked(scores.view(len(where[0]), -1, scores.shape[2]), *where).reshape(scores.shape)


def masked_scores(
    sample: Sample, scores: torch.Tensor, where: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Modified, masked scores and their derivative by the raw score, zero where masked."""
    masked, slope, *_ = derivatives(sample, scores, where)
    return masked, slope


def derivatives(
    sample: Sample, scores: torch.Tensor, where: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """`masked_scores`, and the derivative by the captured tensors in the sample's direction, if it has one.

    Where a score_mod itself gives -inf, finite derivatives become zero, too. Others stay infinite or NaN: the gradient
    is not defined there (0 * inf in stock kernels).
    """
    masked, *slopes = sample.derivatives(scores.view(len(where[0]), -1, scores.shape[2]), *where)
    hidden = masked == -math.inf
    slopes = (slope.masked_fill(hidden & (slope.abs() < math.inf), 0.0) for slope in slopes)
    return tuple(x.reshape(scores.shape) for x in (masked, *slopes))


def weights_of(masked: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """The weights of scores, from log-sum-exps [N, S, 1]."""
    return torch.exp(masked - lse).masked_fill_(lse == -math.inf, 0.0)


def relative(exponent_error: torch.Tensor) -> torch.Tensor:
    """The relative error of a weight whose exponent has this error."""
    return exponent_error.clamp(max=LARGEST).expm1_()


def rounded(problem: Problem, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as stock precision keeps it, in float64."""
    return tensor.to(problem.query.dtype).to(tensor.dtype)


@dataclass(slots=True)
class ModifiedGradient:
    """The gradient of the modified scores, which is also that of a bias added to them, in float64.

    Attributes:
        weights, relative_error: the weights of the scores, and their relative error, that of the log-sum-exps included.
        value: the gradient, never rounded.
        before: the sum of the magnitudes of its terms.
        size: the magnitudes of its two terms, that of the output and that of the log-sum-exp, each of which may be off.
        noise: the error that float32 arithmetic inside of the kernel may add.
    """

    weights: torch.Tensor
    relative_error: torch.Tensor
    value: torch.Tensor
    before: torch.Tensor
    size: torch.Tensor
    noise: torch.Tensor


def modified_gradient_of(pairs: Exact, given: SliceData) -> ModifiedGradient:
    grad, out, lse, *grad_lse = given.of_rows
    terms, lse = grad.to(EXACT).mul_(out), lse.to(EXACT)
    # Every score's gradient of a row subtracts sum(dO * O). O has been rounded, so the sum is off by rounding steps of
    # its terms, however much they cancel. Where a row sees two keys, this error may be all of dQ.
    delta, magnitude = terms.sum(-1, keepdim=True), terms.norm(dim=-1, keepdim=True)
    magnitude += delta.abs()
    summed = terms.abs_().sum(-1, keepdim=True) + sizes_of(grad, given.value)
    del terms
    weights, change = weights_of(pairs.masked, lse), torch.bmm(grad.to(EXACT), given.value.to(EXACT).mT)
    found, before = change - delta, change.abs_().add_(magnitude)
    size = found.abs()
    for of_lse in grad_lse:
        found, before, size = found.add_(of_lse), before.add_(of_lse.abs()), size.add_(of_lse.abs())
    relative_error, size = relative(_finite(lse.abs()).mul_(2 * ROUNDING) + pairs.score_error), size.mul_(weights)
    noise = summed.mul_(SUM_ERROR).mul_(weights).addcmul_(size, relative_error)
    return ModifiedGradient(weights, relative_error, found.mul_(weights), before.mul_(weights), size, noise)


def stock_modified_gradient(masked: torch.Tensor, given: SliceData) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights, and the gradient of the modified scores, neither rounded."""
    grad, out, lse, *grad_lse = given.of_rows
    grad, weights = grad.to(STOCK), weights_of(masked, lse)
    found = torch.bmm(grad, given.value.to(STOCK).mT).sub_(grad.mul_(out).sum(-1, keepdim=True))
    for of_lse in grad_lse:
        found = found.add_(of_lse)
    return weights, found.mul_(weights)


@dataclass(slots=True)
class Gradient:
    """The gradient of the raw scores times the scale, the magnitudes of its terms, and its noise, in float64."""

    weights: torch.Tensor
    relative_error: torch.Tensor
    scores: torch.Tensor
    before: torch.Tensor
    noise: torch.Tensor


def gradient_of(problem: Problem, pairs: Exact, given: SliceData, off: torch.Tensor) -> Gradient:
    """The gradient of the raw scores; `off` is the error that the slope may have."""
    found, slope = modified_gradient_of(pairs, given), pairs.slope * problem.scale
    noise = found.noise.mul_(slope.abs()).addcmul_(found.size, off * abs(problem.scale))
    return Gradient(found.weights, found.relative_error, found.value.mul_(slope), found.before.mul_(slope), noise)


def stock_gradient(
    problem: Problem, sample: Sample, given: SliceData, sizes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The weights, and the gradient of the raw scores times the scale, which is rounded."""
    masked, slope = masked_scores(sample, stock_scores(problem, given, sizes), given.where)
    weights, found = stock_modified_gradient(masked, given)
    # The scale comes first: a gradient that is rounded to fp16 underflows less then.
    return weights, rounded(problem, found.mul_(slope).mul_(problem.scale))


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with 0 in place of infinities and NaNs."""
    return tensor.nan_to_num_(0.0, 0.0, 0.0)
