"""Attention on some pairs of query rows and key columns, in float64 or as stock precision computes it.

Knows nothing of which pairs they are, nor of what is allowed.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.autograd.forward_ad as fwAD

from cudnn_flex_compile.engine.places import SEED
from cudnn_flex_compile.engine.problem import FORWARD, Problem
from cudnn_flex_compile.engine.reference import Sample

# A score_mod's derivative is a float32 function: it is asked to be this exact, relative to its largest value on
# unit normal scores. (cuDNN's 1 - tanh(x)**2 is off by about 1e-6: 1% of what is left of it at x = 5.)
FUNCTION_ERROR = 2.0**-18
# Tensor cores sum products in float32 and cut off what is beyond: relative to the sum of magnitudes.
SUM_ERROR = 2.0**-22
# Scores and log-sum-exps are float32 numbers, whose difference is exponentiated: of two, each rounded once.
ROUNDING = 2.0**-23
EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST_STEP = {torch.bfloat16: 0.0, torch.float16: 2.0**-24}


@dataclass(slots=True)
class Pairs:
    """Scores of rows [P, R, ...] and columns [P, C, ...] of P heads.

    Attributes:
        low: as stock precision does it, else in float64.
        where: batches [P], heads [P], rows [R], columns [C].
        masked: modified, masked scores [P, R, C].
        slope: their derivative by the raw scores, 0 where masked. (In a forward in stock precision: 0.)
        wobble: what float32 scores may move a score by, so a weight relatively; 0 in stock precision.
    """

    problem: Problem
    sample: Sample
    query: torch.Tensor
    key: torch.Tensor
    where: tuple[torch.Tensor, ...]
    low: bool
    masked: torch.Tensor = field(init=False)
    slope: torch.Tensor = field(init=False)
    wobble: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        scores = self.query @ self.key.mT * self.problem.scale
        sizes = self.query.abs() @ self.key.abs().mT * abs(self.problem.scale)
        if self.low:
            generator = torch.Generator(scores.device).manual_seed(SEED)
            scores = scores + torch.empty_like(scores).uniform_(-SUM_ERROR, SUM_ERROR, generator=generator) * sizes
        if self.low:
            self.wobble = torch.zeros_like(scores)
            if self.problem.direction == FORWARD:  # no gradient is asked for, nor how exact the scores are
                self.masked, self.slope = self.sample.masked(scores, *self.where), self.wobble
                return
        self.masked, self.slope = masked_scores(self.sample, scores, *self.where)
        if self.low:
            return
        size = torch.where(self.masked == -math.inf, 0.0, self.masked.abs())
        slope = torch.where(self.slope.isfinite(), self.slope.abs(), 0.0)
        self.wobble = slope * (SUM_ERROR * sizes) + 2 * ROUNDING * size

    def weights(self, lse: torch.Tensor) -> torch.Tensor:
        """From log-sum-exps [P, R, 1]."""
        return torch.where(lse == -math.inf, 0.0, torch.exp(self.masked - lse))

    def rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.problem.query.dtype).to(tensor.dtype) if self.low else tensor


def masked_scores(sample: Sample, scores: torch.Tensor, *where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Modified, masked scores and their derivative by the raw score, zero where masked.

    Where a score_mod itself gives -inf the derivative is zero, too, if it is finite; else the gradient is not defined
    (0 * inf in stock kernels), and stays infinite or NaN.

    By forward-mode differentiation: a reverse pass would wait for autograd's device thread, which may be the
    very one that waits for this certification.
    """
    with fwAD.dual_level():
        dual = sample.masked(fwAD.make_dual(scores, torch.ones_like(scores)), *where)
        masked, slope = fwAD.unpack_dual(dual)
    slope = torch.zeros_like(masked) if slope is None else slope
    return masked, torch.where((masked == -math.inf) & slope.isfinite(), 0.0, slope)


@dataclass(slots=True)
class ModifiedGradient:
    """Of the modified scores [P, R, C], which is that of a bias added to them.

    Attributes:
        weights, wobble: of the scores; the wobble with that of the log-sum-exps.
        value: in float64 or float32, never rounded.
        before: the magnitudes that it is a sum of.
        size: those of its two terms, that of the output and that of the log-sum-exp, which may be off each for itself.
        noise: what else float32 arithmetic inside of the kernel may add; 0 in stock precision.
    """

    weights: torch.Tensor
    wobble: torch.Tensor
    value: torch.Tensor
    before: torch.Tensor
    size: torch.Tensor
    noise: torch.Tensor


def modified_gradient_of(
    pairs: Pairs, value: torch.Tensor, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, grad_lse: torch.Tensor
) -> ModifiedGradient:
    weights, change = pairs.weights(lse), grad @ value.mT
    of_out = change - (grad * out).sum(-1, keepdim=True)
    found = weights * (of_out + grad_lse)
    before = weights * (change.abs() + _row_term(grad, out) + grad_lse.abs())
    size = weights * (of_out.abs() + grad_lse.abs())
    if pairs.low:
        return ModifiedGradient(weights, pairs.wobble, found, before, size, pairs.wobble)
    wobble = pairs.wobble + torch.where(lse.isfinite(), 2 * ROUNDING * lse.abs(), 0.0)
    wobble = torch.expm1(wobble.clamp(max=50.0))
    summed = SUM_ERROR * (grad.abs() @ value.abs().mT + (grad * out).abs().sum(-1, keepdim=True))
    return ModifiedGradient(weights, wobble, found, before, size, size * wobble + weights * summed)


@dataclass(slots=True)
class Gradient:
    """Of the raw scores [P, R, C]: their gradient times the scale; the magnitudes that it is a sum of; its noise."""

    weights: torch.Tensor
    wobble: torch.Tensor
    scores: torch.Tensor
    before: torch.Tensor
    noise: torch.Tensor


def gradient_of(
    pairs: Pairs, value: torch.Tensor, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    grad_lse: torch.Tensor, off: torch.Tensor,
) -> Gradient:  # fmt: skip
    """`off` is what the slope may be off by."""
    scale, modified = pairs.problem.scale, modified_gradient_of(pairs, value, grad, out, lse, grad_lse)
    scores = pairs.rounded(modified.value * pairs.slope * scale)  # scaled first: rounded to fp16, it underflows later
    before = modified.before * pairs.slope * scale
    noise = (modified.noise * pairs.slope.abs() + modified.size * off) * abs(scale) if not pairs.low else pairs.wobble
    return Gradient(modified.weights, modified.wobble, scores, before, noise)


def _row_term(grad: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The magnitude of sum(dO * O), which every score's gradient of a row subtracts: [P, R, 1].

    O has been rounded, so the sum is off by rounding steps of its terms, however much they cancel: where a row sees
    two keys, that may be all of dQ.
    """
    terms = grad * out
    return terms.sum(-1, keepdim=True).abs() + terms.norm(dim=-1, keepdim=True)
