"""What sampled rows and columns of attention should be: in float64, and as stock precision computes them.

Knows nothing of plans or of what is allowed. A backward is a function of its inputs: what it should give follows
from the output and log-sum-exp that it is given. Memory is O(samples x length).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cudnn_flex_compile.engine.pairs import (
    EPSILON,
    FUNCTION_ERROR,
    SMALLEST_STEP,
    ModifiedGradient,
    Pairs,
    gradient_of,
    masked_scores,
    modified_gradient_of,
)
from cudnn_flex_compile.engine.places import Places
from cudnn_flex_compile.engine.problem import Problem, TensorSpec
from cudnn_flex_compile.engine.reference import Sample
from cudnn_flex_compile.engine.regimes import Tensors

# Elements of one float64 tensor of queries (128 MiB), which say how many heads are computed at a time.
AT_ONCE = 2**24


@dataclass(slots=True)
class Block:
    """What some rows [N, R, D] of one quantity should be.

    Attributes:
        value: in float64, or as stock precision computes it.
        step: a rounding step of each row's sum, [N, R].
        noise: what else float32 arithmetic inside of the kernel may add, [N, R, D]; 0 in stock precision.
        hidden: rows that no visible pair has a part in, which must be zero, [N, R].
    """

    value: torch.Tensor
    step: torch.Tensor
    noise: torch.Tensor
    hidden: torch.Tensor


@dataclass(slots=True)
class LogSums:
    """Natural log-sum-exps [N, R], and how far off float32 scores may move them."""

    value: torch.Tensor
    noise: torch.Tensor


def slope_error(problem: Problem, sample: Sample, t: Tensors, where: Places) -> torch.Tensor:
    """What a score_mod's derivative may be off by: 0-d. The tensors are unit normal ones."""
    query, key = (x.double() for x in _rows_and_keys(problem, t, where))
    place = (where.batches, where.heads, where.rows, _every(key))
    slope = masked_scores(sample, query @ key.mT * problem.scale, *place)[1].abs()
    return FUNCTION_ERROR * torch.where(slope.isfinite(), slope, 0.0).max()


def expected_rows(problem: Problem, t: Tensors, sample: Sample, where: Places, low: bool) -> tuple[Block, LogSums]:
    """Outputs and log-sum-exps of the sampled query rows."""
    pairs, value = _pairs_of_rows(problem, t, sample, where, low)
    lse = pairs.masked.logsumexp(-1, keepdim=True)
    weights = pairs.weights(lse)
    out = pairs.rounded(pairs.rounded(weights) @ value)
    noise = weights * torch.expm1(pairs.wobble.clamp(max=50.0))
    hidden = (pairs.masked == -math.inf).all(-1)
    block = Block(out, _summed(weights, value, problem), (noise**2 @ value**2).sqrt(), hidden)
    return block, LogSums(lse[..., 0], noise.sum(-1))


def expected_dq(
    problem: Problem, t: Tensors, sample: Sample, where: Places, low: bool, off: torch.Tensor
) -> Block:  # fmt: skip
    """dQ of the sampled query rows; `off` is the slope_error."""
    pairs, value = _pairs_of_rows(problem, t, sample, where, low)
    given = (_of_rows(x, where.batches, where.heads, where.rows).to(value.dtype) for x in _given(t))
    grad, out, lse, grad_lse = given
    found = gradient_of(pairs, value, grad, out, lse, grad_lse, off)
    dq = pairs.rounded(found.scores @ pairs.key)
    noise = (found.noise**2 @ pairs.key**2).sqrt()
    return Block(dq, _summed(found.before, pairs.key, problem), noise, (pairs.masked == -math.inf).all(-1))


def expected_columns(
    problem: Problem, t: Tensors, sample: Sample, where: Places, low: bool, off: torch.Tensor
) -> tuple[Block, Block]:  # fmt: skip
    """dK and dV of the sampled key columns, of the kv head of each sampled head, summed over all of its heads."""
    dk, dv = (_zeros(problem, x, where, low) for x in (t.key, t.value))
    dk_noise, dv_noise = torch.zeros_like(dk.value), torch.zeros_like(dv.value)
    for batches, heads in _groups(problem, t, where):
        n = len(where.heads)
        pairs, value = _pairs_of_columns(problem, t, sample, (batches, heads, where.columns), low)
        grad, out, lse, grad_lse = (x[batches, heads].to(value.dtype) for x in _given(t))
        found = gradient_of(pairs, value, grad, out, lse, grad_lse, off)
        weights = pairs.rounded(found.weights)
        dk.value += _together(found.scores.mT @ pairs.query, n)
        dv.value += _together(weights.mT @ grad, n)
        dk.step += _together(_summed(found.before.mT, pairs.query, problem), n)
        dv.step += _together(_summed(weights.mT, grad, problem), n)
        dk_noise += _together(found.noise.mT**2 @ pairs.query**2, n)
        dv_noise += _together((found.weights * found.wobble).mT ** 2 @ grad**2, n)
        hidden = (pairs.masked == -math.inf).all(-2).view(-1, n, len(where.columns)).all(0)
        dk.hidden &= hidden
        dv.hidden &= hidden
    for block, noise in ((dk, dk_noise), (dv, dv_noise)):
        block.value, block.noise = _rounded(block.value, problem, low), noise.sqrt()
    return dk, dv


def expected_bias(
    problem: Problem, t: Tensors, sample: Sample, where: Places, spec: TensorSpec, low: bool
) -> tuple[Block, Block]:  # fmt: skip
    """The gradient of a learned operand, [B or 1, H or 1, Sq, Skv], of the sampled heads: sampled rows, and sampled
    columns. It is summed over the batch entries and heads that share an entry; each of these terms has 16 bits.
    """
    found: list[Block] = []
    for transposed in (False, True):
        sampled = where.columns if transposed else where.rows
        other = torch.arange(problem.lengths[not transposed], device=sampled.device)
        shape = (len(where.heads), len(sampled), len(other))
        value, noise, squares = (torch.zeros(shape, dtype=_work(low), device=sampled.device) for _ in range(3))
        hidden = torch.ones(shape[:2], dtype=torch.bool, device=sampled.device)
        for batches, heads in _sharing(problem, where, spec, math.prod(shape)):
            place = (batches, heads, other, sampled) if transposed else (batches, heads, sampled, other)
            part, masked = _of_bias(problem, t, sample, place, low)
            for total, term in ((value, part.value), (noise, part.noise**2), (squares, part.before**2)):
                total += _together(term.mT if transposed else term, len(where.heads))
            masked = (masked == -math.inf).all(-2 if transposed else -1)
            hidden &= masked.view(-1, *shape[:2]).all(0)
        dtype, terms = problem.query.dtype, other.numel() * _sharers(problem, spec).numel()
        step = EPSILON[dtype] * squares.sum(-1).sqrt() + SMALLEST_STEP[dtype] * math.sqrt(terms)
        found.append(Block(_rounded(value, problem, low), step, noise.sqrt(), hidden))
    return found[0], found[1]


def _of_bias(
    problem: Problem, t: Tensors, sample: Sample, place: tuple[torch.Tensor, ...], low: bool
) -> tuple[ModifiedGradient, torch.Tensor]:
    """For batches, heads, rows and columns: the gradient, rounded in stock precision; and the masked scores."""
    batches, heads, rows, columns = place
    kv_heads = heads // group_of(problem)
    query, *given = (_of_rows(x, batches, heads, rows).to(_work(low)) for x in (t.query, *_given(t)))
    key, value = (_of_rows(x, batches, kv_heads, columns).to(_work(low)) for x in (t.key, t.value))
    pairs = Pairs(problem, sample, query, key, place, low)
    found = modified_gradient_of(pairs, value, *given)
    found.value = pairs.rounded(found.value)
    return found, pairs.masked


def _sharers(problem: Problem, spec: TensorSpec) -> torch.Tensor:
    """Which batch entries and heads share an entry of an operand, as differences to the first that does: [M]."""
    batch, heads, _ = problem.lse_shape
    shared = (batch if spec.shape[0] == 1 else 1, heads if spec.shape[1] == 1 else 1)
    of_batch, of_head = (torch.arange(n) for n in shared)
    return (of_batch[:, None] * heads + of_head).flatten()


def _sharing(
    problem: Problem, where: Places, spec: TensorSpec, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batch entries and heads that share entries of an operand with the sampled ones, so many at a time that
    `size` numbers of each are few: [G * N] each.
    """
    heads = problem.lse_shape[1]
    first = where.batches * (spec.shape[0] > 1) * heads + where.heads * (spec.shape[1] > 1)
    for some in _sharers(problem, spec).to(first.device).split(max(1, AT_ONCE // (4 * size))):
        members = (first + some[:, None]).flatten()
        yield members // heads, members % heads


def _summed(weights: torch.Tensor, terms: torch.Tensor, problem: Problem) -> torch.Tensor:
    """The rounding step of each row of weights @ terms, whose signs may be any: [P, R]."""
    dtype, squares = problem.query.dtype, terms**2
    size = (weights**2 @ squares).sum(-1).sqrt()
    return EPSILON[dtype] * size + SMALLEST_STEP[dtype] * squares.sum((-2, -1)).sqrt()[..., None]


def _rounded(tensor: torch.Tensor, problem: Problem, low: bool) -> torch.Tensor:
    return tensor.to(problem.query.dtype).to(tensor.dtype) if low else tensor


def _given(t: Tensors) -> tuple[torch.Tensor, ...]:
    return t.grad, t.out, t.stats, t.grad_lse


def _work(low: bool) -> torch.dtype:
    return torch.float32 if low else torch.float64


def _every(tensor: torch.Tensor) -> torch.Tensor:
    return torch.arange(tensor.shape[-2], device=tensor.device)


def _of_rows(tensor: torch.Tensor, batches: torch.Tensor, heads: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] -> [P, R, D]"""
    return tensor[batches[:, None], heads[:, None], rows]


def _rows_and_keys(problem: Problem, t: Tensors, where: Places) -> tuple[torch.Tensor, torch.Tensor]:
    kv_heads = where.heads // group_of(problem)
    return _of_rows(t.query, where.batches, where.heads, where.rows), t.key[where.batches, kv_heads]


def group_of(problem: Problem) -> int:
    """Query heads for each kv head."""
    return problem.query.shape[1] // problem.key.shape[1]


def _pairs_of_rows(
    problem: Problem, t: Tensors, sample: Sample, where: Places, low: bool
) -> tuple[Pairs, torch.Tensor]:  # fmt: skip
    """Sampled rows and all columns, and the values of these."""
    query, key = (x.to(_work(low)) for x in _rows_and_keys(problem, t, where))
    value = t.value[where.batches, where.heads // group_of(problem)].to(_work(low))
    return Pairs(problem, sample, query, key, (where.batches, where.heads, where.rows, _every(key)), low), value


def _pairs_of_columns(
    problem: Problem, t: Tensors, sample: Sample, where: tuple[torch.Tensor, ...], low: bool
) -> tuple[Pairs, torch.Tensor]:  # fmt: skip
    """All rows of some heads and sampled columns, and the values of these."""
    batches, heads, columns = where
    kv_heads = heads // group_of(problem)
    query = t.query[batches, heads].to(_work(low))
    key, value = (_of_rows(x, batches, kv_heads, columns).to(_work(low)) for x in (t.key, t.value))
    return Pairs(problem, sample, query, key, (batches, heads, _every(query), columns), low), value


def _zeros(problem: Problem, like: torch.Tensor, where: Places, low: bool) -> Block:
    shape = (len(where.heads), len(where.columns))
    value = torch.zeros((*shape, like.shape[3]), dtype=_work(low), device=like.device)
    hidden = torch.ones(shape, dtype=torch.bool, device=like.device)
    return Block(value, torch.zeros(shape, dtype=value.dtype, device=like.device), value, hidden)


def _groups(problem: Problem, t: Tensors, where: Places) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The query heads of the kv heads of the sampled heads, so many at a time: [G * N] batches and heads."""
    group, size = group_of(problem), t.query.shape[2] * max(t.query.shape[3], t.value.shape[3])
    step = max(1, AT_ONCE // (size * len(where.heads)))
    first = where.heads // group * group
    for start in range(0, group, step):
        members = torch.arange(start, min(start + step, group), device=first.device)[:, None]
        yield where.batches.repeat(len(members)), (first + members).flatten()


def _together(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """[G * N, ...] -> [N, ...], summed over the heads of each group."""
    return tensor.unflatten(0, (-1, count)).sum(0)
