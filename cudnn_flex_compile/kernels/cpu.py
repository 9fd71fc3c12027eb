"""The CPU kernels of the ops: the program through the reference interpreter, a block of query rows at a time.

It computes in float32, for tests and for explaining, and not for speed. The ops call it for CPU tensors.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cudnn_flex_compile.kernels.arguments import Arguments
from cudnn_flex_compile.kernels.stock import Stock
from cudnn_flex_compile.scoremod.derive import derive
from cudnn_flex_compile.scoremod.interpret import environment, evaluate
from cudnn_flex_compile.scoremod.ir import Program
from cudnn_flex_compile.scoremod.learned import position
from cudnn_flex_compile.scoremod.saturate import exact
from cudnn_flex_compile.scoremod.simplify import simplify
from cudnn_flex_compile.scoremod.text import parse

BLOCK_ELEMENTS = 2**24
LOG2E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Block:
    """Some query rows [B, H, R, ...] of a call; a slice of rows, their modified, masked scores."""

    rows: slice
    visible: Tensor
    masked: Tensor
    gradient_of: "Gradient"


@dataclass(frozen=True, slots=True)
class Gradient:
    """Computes the gradient of the raw score from that of the modified score."""

    program: Program
    scores: Tensor
    indices: dict[str, Tensor]
    operands: dict[int, Tensor]
    ints: dict[int, int]
    floats: dict[int, float]
    captured: Sequence[Tensor]

    def __call__(self, grad: Tensor) -> Tensor:
        expression = derive(self.program.score)
        if expression is None:
            return torch.zeros_like(grad)
        leaf = environment(self.scores, self.indices, self.operands, self.ints, self.floats, grad, self.captured)
        return evaluate(simplify(expression), leaf).expand(grad.shape)


def per_head(tensor: Tensor, heads: int) -> Tensor:
    """[B, Hkv, S, D] -> [B, Hq, S, D], float32."""
    return tensor.float().repeat_interleave(heads // tensor.shape[1], dim=1)


def _blocks(
    query: Tensor, key: Tensor, given: Arguments, program: Program, stock: Stock | None = None
) -> Iterator[Block]:
    captured = () if stock is None else stock.captured
    batch, heads, length, _ = query.shape
    columns = key.shape[2]
    keys = per_head(key, heads)
    step = max(1, BLOCK_ELEMENTS // max(1, batch * heads * columns))
    every = {
        "b": torch.arange(batch, dtype=torch.int32).view(-1, 1, 1, 1),
        "h": torch.arange(heads, dtype=torch.int32).view(-1, 1, 1),
        "q": torch.arange(length, dtype=torch.int32).view(-1, 1),
        "k": torch.arange(columns, dtype=torch.int32),
    }
    ints = dict(enumerate(exact((program.score, program.mask), given.ints)))
    numbers = ints, {i: float(t) for i, t in enumerate(given.floats)}
    for start in range(0, length, step):
        rows = slice(start, start + step)
        scores = query[:, :, rows].float() @ keys.transpose(-2, -1) * given.scale
        indices = {**every, "q": every["q"][rows]}
        near = {i: t[:, :, rows] if t.shape[2] > 1 else t for i, t in enumerate(given.operands)}
        leaf = environment(scores, indices, near, *numbers, captured=captured)
        visible = evaluate(program.mask, leaf).expand(scores.shape)
        if stock is not None:
            partial, full = stock.listed_pairs(every["q"][rows, 0], every["k"])
            visible = (visible & partial) | full
        masked = torch.where(visible, evaluate(program.score, leaf), -math.inf)
        yield Block(rows, visible, masked, Gradient(program, scores, indices, near, *numbers, captured))


def forward(
    query: Tensor, key: Tensor, value: Tensor, given: Arguments, out: Tensor, stats: Tensor, stock: Stock | None = None
) -> None:  # fmt: skip
    """Fills `out` [B, H, Sq, Dv] and `stats` [B, H, Sq] (natural log-sum-exp, float32); with `stock`, by its blocks."""
    program = parse(given.program if stock is None else stock.program)
    if stock is not None:
        key, value = stock.own_order(key), stock.own_order(value)
    values = per_head(value, query.shape[1])
    for block in _blocks(query, key, given, program, stock):
        stats[:, :, block.rows] = block.masked.logsumexp(-1)
        out[:, :, block.rows] = (_weights(block).to(query.dtype).float() @ values).to(query.dtype)


def _weights(block: Block) -> Tensor:
    """The weights of a block, zero in rows that see no key.

    They are not computed from the log-sum-exp: beside equal scores of -1e9, which hide a whole row, the logarithm of
    their number is lost.
    """
    return torch.where((block.masked == -math.inf).all(-1, keepdim=True), 0.0, block.masked.softmax(-1))


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor,
    given: Arguments, stock: Stock | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dQ, dK, dV in float32, dK and dV per kv head, and the gradient of the learned operand, if there is one.

    `grad_lse` is with respect to the natural log-sum-exp.
    """
    program = parse(given.program if stock is None else stock.program)
    if stock is not None:
        key, value = stock.own_order(key), stock.own_order(value)
    heads, kv_heads = query.shape[1], key.shape[1]
    keys, values = per_head(key, heads), per_head(value, heads)
    learned = position(program)
    dbias = [] if learned is None else [torch.zeros(given.operands[learned].shape, dtype=torch.float32)]
    dq = torch.empty(query.shape, dtype=torch.float32)
    dk, dv = (torch.zeros(t.shape, dtype=torch.float32) for t in (keys, values))
    delta = (grad_out.float() * out.float()).sum(-1)
    if grad_lse is not None:  # the log-sum-exp's derivative with respect to a score is its weight
        delta = delta - grad_lse
    for block in _blocks(query, key, given, program, stock):
        rows = block.rows
        grad, weights = grad_out[:, :, rows].float(), _weights(block)
        d_masked = weights * (grad @ values.transpose(-2, -1) - delta[:, :, rows].unsqueeze(-1))
        for near in (tensor[:, :, rows] for tensor in dbias):
            near += torch.where(block.visible, d_masked, 0.0).sum_to_size(near.shape)
        d_scores = torch.where(block.visible, block.gradient_of(d_masked), 0.0) * given.scale
        dq[:, :, rows] = d_scores @ keys
        dk += d_scores.transpose(-2, -1) @ query[:, :, rows].float()
        dv += weights.transpose(-2, -1) @ grad
    group = (kv_heads, heads // kv_heads)
    dk, dv = (t.unflatten(1, group).sum(2) for t in (dk, dv))
    if stock is not None:
        dk, dv = stock.given_order(dk), stock.given_order(dv)
    return dq, dk, dv, *dbias
