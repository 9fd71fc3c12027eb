"""A plan's stand-in that rounds where flash attention does: what a right plan's numbers look like.

Knows nothing of certification. The forward's weights are relative to each row's largest score and are rounded before
they are normalised; the backward computes the scores again, in another order, and rounds weights and gradients.
"""

import math

import torch

from cudnn_flex_compile.engine.problem import FORWARD
from cudnn_flex_compile.kernels.arguments import Arguments
from cudnn_flex_compile.kernels.cpu import _blocks, per_head
from tests.support.ready import Ready

CUT_OFF = 2.0**-23  # of what a tensor core sums, relative to the sum of magnitudes


class FlashStandIn(Ready):
    strategy, device = "flash", torch.device("cpu")

    def __init__(self, problem):
        self.problem = problem
        self.outputs = (problem.query, problem.key, problem.value)

    def run(self, tensors, operands, ints, floats):
        rest = Arguments(operands, ints, floats, self.problem.program, self.problem.scale)
        (self._forward if self.problem.direction == FORWARD else self._backward)(*tensors, rest=rest)

    def _block(self, query, key, rest):
        """All rows, with scores off by what a tensor core may cut off."""
        heads = query.shape[1]
        size = query.float().abs() @ per_head(key, heads).abs().mT * abs(self.problem.scale)
        (block,) = _blocks(query, key, rest, rest.program)
        seed = 1 if self.problem.direction == FORWARD else 2
        noise = torch.empty_like(size).uniform_(-CUT_OFF, CUT_OFF, generator=torch.Generator().manual_seed(seed))
        block.gradient_of.scores.add_(noise * size)
        return block

    def _modified(self, block, rest):
        from cudnn_flex_compile.scoremod.interpret import environment, evaluate

        gradient = block.gradient_of
        numbers = gradient.ints, gradient.floats
        leaf = environment(gradient.scores, gradient.indices, gradient.operands, *numbers)
        return torch.where(block.visible, evaluate(rest.program.score, leaf), -math.inf)

    def _forward(self, query, key, value, out, stats=None, *, rest):
        modified = self._modified(self._block(query, key, rest), rest)
        largest = modified.amax(-1, keepdim=True)
        safe = torch.where(largest == -math.inf, 0.0, largest)
        weights = torch.exp(modified - safe)
        total = weights.sum(-1, keepdim=True)
        values = weights.to(query.dtype).float() @ per_head(value, query.shape[1])
        out.copy_(torch.where(total == 0, 0.0, values / total))
        if stats is not None:
            stats.copy_(safe + total.log())

    def _backward(self, query, key, value, out, stats, grad, *tensors, rest):
        of_lse, gradients = tensors[:-3], tensors[-3:]
        dtype, heads = query.dtype, query.shape[1]
        block = self._block(query, key, rest)
        modified = self._modified(block, rest)
        weights = torch.where(stats == -math.inf, 0.0, torch.exp(modified - stats))
        delta = (grad.float() * out.float()).sum(-1, keepdim=True)
        d_masked = weights * (grad.float() @ per_head(value, heads).mT - delta)
        for grad_lse in of_lse:
            d_masked = d_masked + weights * grad_lse
        d_scores = torch.where(modified == -math.inf, 0.0, block.gradient_of(d_masked)) * self.problem.scale
        d_scores, weights = d_scores.to(dtype).float(), weights.to(dtype).float()
        found = [d_scores @ per_head(key, heads), d_scores.mT @ query.float(), weights.mT @ grad.float()]
        group = (key.shape[1], -1)
        for into, gradient in zip(gradients, found, strict=True):
            into.copy_(gradient if into is gradients[0] else gradient.unflatten(1, group).sum(2))
