"""Inductor's flex_attention for a program: what runs where a shape that only came up later has no certified plan.

Knows nothing of cuDNN. The model is not recompiled: only this call is, once per program and shape.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cudnn_flex_compile.scoremod.interpret import environment, evaluate
from cudnn_flex_compile.scoremod.ir import Program
from cudnn_flex_compile.scoremod.learned import position_in
from cudnn_flex_compile.scoremod.text import parse


def score_mod_of(program: Program, operands: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> Any:
    """A stock score_mod that computes the program, with -inf where the mask does not hold."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        def pick(tensor: Tensor) -> Tensor:
            where = [i if n > 1 else torch.zeros_like(i) for i, n in zip((b, h, q, kv), tensor.shape, strict=True)]
            return tensor[where[0], where[1], where[2], where[3]]

        near = {i: pick(t) for i, t in enumerate(operands)}
        indices = {"b": b, "h": h, "q": q, "k": kv}
        leaf = environment(score.float(), indices, near, dict(enumerate(ints)), dict(enumerate(floats)))
        modified = evaluate(program.score, leaf)
        return torch.where(evaluate(program.mask, leaf), modified, float("-inf"))

    return score_mod


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def forward(
    query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor], ints: Sequence[int],
    floats: Sequence[Tensor], program: str, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and the natural log-sum-exp [B, H, Sq]."""
    score_mod = score_mod_of(parse(program), operands, ints, [float(f) for f in floats])
    gqa = query.shape[1] != key.shape[1]
    return _compiled()(query, key, value, score_mod=score_mod, scale=scale, enable_gqa=gqa, return_lse=True)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor],
    ints: Sequence[int], floats: Sequence[Tensor], program: str, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dQ, dK, dV, and the gradient of the learned operand, if there is one, contiguous and in its dtype.

    Computes the forward again. Needs autograd to be on.
    """
    position, given = position_in(program), list(operands)
    learned = [] if position is None else [position]
    leaves = [t.detach().requires_grad_() for t in (query, key, value, *(given[i] for i in learned))]
    for i in learned:
        given[i] = leaves[3]
    out, lse = forward(leaves[0], leaves[1], leaves[2], given, ints, floats, program, scale)
    if grad_lse is None:
        return torch.autograd.grad(out, leaves, grad_out)
    return torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
