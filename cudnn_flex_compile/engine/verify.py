"""Certification: runs a plan on synthetic inputs at its own shape and compares sampled rows and columns.

Knows nothing of strategies. The reference is float64 on sampled query rows (out, LSE, dQ) and key columns (dK,
dV); the yardstick is what the same computation gives in the precision of stock attention. Memory is that of the
problem's own tensors plus O(samples x length).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.autograd.forward_ad as fwAD

from cudnn_flex_compile.engine.problem import BACKWARD, Problem, TensorSpec
from cudnn_flex_compile.engine.reference import Reference, Sample
from cudnn_flex_compile.reasons import Code, Reason

SEED = 20240817
ROWS, HEADS = 24, 3
REGIMES = {"unit normal": 0.0, "scores shifted by -100": -100.0, "scores shifted by +100": 100.0}
# A plan may be this much further from float64 than stock precision is, in total. The few sampled rows of few keys
# weigh much in the total, and differ from kernel to kernel: plans that are within 2 on all rows (tests/gpu) were seen
# at 2.3 here. Wrong ones were seen at 20 and more.
TOTAL_FACTOR = 3.0
# One row may be off by this many rounding steps of the magnitudes that it sums: where they cancel, as dQ does in a
# row of two keys, rounding is large beside the sum, and differs from kernel to kernel.
ROW_STEPS = 8.0
# A score_mod's derivative is a float32 function: it is asked to be this exact, relative to its largest value on
# unit normal scores. (cuDNN's 1 - tanh(x)**2 is off by about 1e-6: 1% of what is left of it at x = 5.)
FUNCTION_ERROR = 2.0**-18
# Tensor cores sum q . k in float32 and cut off what is beyond: relative to the sum of magnitudes.
SUM_ERROR = 2.0**-22
EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST_STEP = {torch.bfloat16: 0.0, torch.float16: 2.0**-24}


class Runnable(Protocol):
    """What is certified: a plan, or whatever stands in for one."""

    problem: Problem
    strategy: str
    outputs: tuple[TensorSpec, ...]
    device: torch.device

    def run(
        self, tensors: Sequence[torch.Tensor], operands: Sequence[torch.Tensor], ints: Sequence[int],
        floats: Sequence[torch.Tensor],
    ) -> None: ...  # fmt: skip


@dataclass(slots=True)
class Tensors:
    """Inputs and outputs of the plans under test, by role, for one regime.

    With a shift, component 0 of all queries and keys is one large number each, which shifts every score. That
    component of dQ and dK is a sum that cancels, times that number: rounding noise. The others are judged.
    """

    shift: float

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grad: torch.Tensor
    out: torch.Tensor
    stats: torch.Tensor


def certify(plan: Runnable, forward: Runnable, reference: Reference) -> Reason | None:
    """None if the plan is right on every sample, else what is wrong.

    Args:
        plan: the plan under test.
        forward: the plan itself, or for a backward a certified forward of the same call.
        reference: where the expected values come from.
    """
    problem = plan.problem
    for regime, shift in REGIMES.items():
        generator = torch.Generator(plan.device).manual_seed(SEED)
        sample = reference.sample(problem, generator)
        tensors = _inputs(problem, shift, generator)
        _run(forward, (tensors.query, tensors.key, tensors.value), (tensors.out, tensors.stats), sample)
        check = _check_backward if problem.direction == BACKWARD else _check_forward
        wrong = check(plan, tensors, sample)
        if wrong is not None:
            return Reason(Code.CERTIFICATION, f"{plan.strategy}, {problem.direction}, {regime}: {wrong}")
    return None


def _inputs(problem: Problem, shift: float, generator: torch.Generator) -> Tensors:
    device = generator.device
    query, key, value = (
        spec.empty(device).normal_(generator=generator) for spec in (problem.query, problem.key, problem.value)
    )
    if shift:
        size = math.sqrt(abs(shift) / abs(problem.scale))
        query[..., 0] = size
        key[..., 0] = math.copysign(size, shift * problem.scale)
    grad = (problem.grad or problem.out).empty(device).normal_(generator=generator)
    out = problem.out.empty(device).fill_(math.nan)
    stats = torch.full((*problem.lse_shape, 1), math.nan, device=device)
    return Tensors(shift, query, key, value, grad, out, stats)


def _run(plan: Runnable, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], sample: Sample) -> None:
    wanted = outputs if plan.problem.direction == BACKWARD or plan.problem.stats else outputs[:1]
    plan.run((*inputs, *wanted), sample.operands, sample.ints, sample.floats)


def _spread(length: int, generator: torch.Generator) -> torch.Tensor:
    """Indices at the ends, at tile edges and at random, sorted, each once."""
    edges = [0, 1, 63, 64, 127, 128, 255, 256, length // 2, length - 2, length - 1]
    kept = torch.tensor([i for i in edges if 0 <= i < length])
    drawn = torch.randint(length, (ROWS,), generator=torch.Generator().manual_seed(generator.initial_seed()))
    return torch.cat([kept, drawn]).unique().to(generator.device)


def _heads(problem: Problem) -> list[tuple[int, int]]:
    batch, heads, _ = problem.lse_shape
    pairs = [(0, 0), (batch - 1, heads - 1), (batch // 2, heads // 2)]
    return sorted(set(pairs[:HEADS]))


@dataclass(slots=True)
class Block:
    """What some rows [N, D] of one quantity should be.

    Attributes:
        value: in float64, or as stock precision computes it.
        step: a rounding step of each row's sum, [N].
        noise: what the derivative's own rounding may add, [N, D] or 0.
    """

    value: torch.Tensor
    step: torch.Tensor
    noise: torch.Tensor | float = 0.0


@dataclass(slots=True)
class Row:
    """What one block of query rows should be."""

    out: Block
    lse: torch.Tensor
    dq: Block


def _summed(weights: torch.Tensor, terms: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rounding step of each row of weights @ terms, whose signs may be any: [N]."""
    size = (weights**2 @ terms**2).sum(-1).sqrt()
    return EPSILON[dtype] * size + SMALLEST_STEP[dtype] * (terms**2).sum().sqrt()


def _rows(problem: Problem, t: Tensors, sample: Sample, b: int, h: int, rows: torch.Tensor, low: bool) -> Row:
    """Attention of some query rows of one head: [R, ...]. `low` rounds where flash attention rounds."""
    group = problem.query.shape[1] // problem.key.shape[1]
    work = torch.float32 if low else torch.float64
    narrow = problem.query.dtype
    q = t.query[b, h, rows].to(work)
    k, v, grad = t.key[b, h // group].to(work), t.value[b, h // group].to(work), t.grad[b, h, rows].to(work)
    columns = torch.arange(k.shape[0], device=k.device, dtype=torch.int32)
    place = (b, h, rows.to(torch.int32), columns)
    scores = _scores(q, k, problem.scale, low)
    masked, slope = _masked(sample, scores, *place)
    lse = masked.logsumexp(-1)
    weights = torch.where(lse[:, None] == -math.inf, 0.0, torch.exp(masked - lse[:, None]))
    rounded = weights.to(narrow).to(work) if low else weights
    out = rounded @ v
    out = out.to(narrow).to(work) if low else out
    d_masked = weights * (grad @ v.T - (grad * out).sum(-1, keepdim=True))
    d_scores = d_masked * slope * problem.scale  # scaled before it is rounded: fp16 underflows that much sooner
    d_scores = d_scores.to(narrow).to(work) if low else d_scores
    dq = d_scores @ k
    noise = (d_masked**2 @ k**2).sqrt() * (problem.scale * _slope_error(sample, scores - t.shift, *place))
    before = weights * ((grad @ v.T).abs() + _row_term(grad, out)) * slope * problem.scale
    dq = dq.to(narrow).to(work) if low else dq
    return Row(Block(out, _summed(weights, v, narrow)), lse, Block(dq, _summed(before, k, narrow), noise))


def _row_term(grad: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The magnitude of sum(dO * O), which every score's gradient of a row subtracts: [R, 1].

    O has been rounded, so the sum is off by rounding steps of its terms, however much they cancel: where a row sees
    two keys, that may be all of dQ.
    """
    terms = grad * out
    return terms.sum(-1, keepdim=True).abs() + terms.norm(dim=-1, keepdim=True)


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, low: bool) -> torch.Tensor:
    scores = q @ k.T * scale
    if not low:
        return scores
    generator = torch.Generator(q.device).manual_seed(SEED)
    noise = torch.empty_like(scores).uniform_(-SUM_ERROR, SUM_ERROR, generator=generator)
    return scores + noise * (q.abs() @ k.abs().T * abs(scale))


def _slope_error(sample: Sample, scores: torch.Tensor, *place: Any) -> float:
    slope = _masked(sample, scores, *place)[1].abs()
    return FUNCTION_ERROR * float(torch.where(slope.isfinite(), slope, 0.0).max())


def _masked(sample: Sample, scores: torch.Tensor, *place: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Modified, masked scores and their derivative by the raw score, zero where masked.

    By forward-mode differentiation: a reverse pass would wait for autograd's device thread, which may be the
    very one that waits for this certification.
    """
    with fwAD.dual_level():
        dual = sample.masked(fwAD.make_dual(scores, torch.ones_like(scores)), *place)
        masked, slope = fwAD.unpack_dual(dual)
    slope = torch.zeros_like(masked) if slope is None else slope
    return masked, torch.where(masked == -math.inf, 0.0, slope)


def _columns(
    problem: Problem, t: Tensors, sample: Sample, b: int, kv_head: int, columns: torch.Tensor, low: bool
) -> tuple[Block, Block]:
    """dK and dV of some key columns of one kv head, summed over its query heads."""
    group = problem.query.shape[1] // problem.key.shape[1]
    work = torch.float32 if low else torch.float64
    narrow = problem.query.dtype
    k, v = t.key[b, kv_head, columns].to(work), t.value[b, kv_head, columns].to(work)
    dk, dv = (
        Block(torch.zeros_like(k), k.new_zeros(len(k)), torch.zeros_like(k)),
        Block(torch.zeros_like(v), v.new_zeros(len(v))),
    )
    rows = torch.arange(problem.lengths[0], device=k.device, dtype=torch.int32)
    for h in range(kv_head * group, (kv_head + 1) * group):
        q, grad, out = (x[b, h].to(work) for x in (t.query, t.grad, t.out))
        lse = t.stats[b, h].to(work)
        place = (b, h, rows, columns.to(torch.int32))
        scores = _scores(q, k, problem.scale, low)
        masked, slope = _masked(sample, scores, *place)
        weights = torch.where(lse == -math.inf, 0.0, torch.exp(masked - lse))
        d_masked = weights * (grad @ v.T - (grad * out).sum(-1, keepdim=True))
        d_scores = d_masked * slope * problem.scale
        if low:
            weights, d_scores = (x.to(narrow).to(work) for x in (weights, d_scores))
        before = weights * ((grad @ v.T).abs() + _row_term(grad, out)) * slope * problem.scale
        dv.value += weights.T @ grad
        dv.step += _summed(weights.T, grad, narrow)
        dk.value += d_scores.T @ q
        dk.step += _summed(before.T, q, narrow)
        dk.noise += (d_masked.T**2 @ q**2).sqrt() * (problem.scale * _slope_error(sample, scores - t.shift, *place))
    for block in (dk, dv) if low else ():
        block.value = block.value.to(narrow).to(work)
    return dk, dv


def _check_forward(plan: Runnable, t: Tensors, sample: Sample) -> str | None:
    problem = plan.problem
    generator = torch.Generator(t.query.device).manual_seed(SEED)
    rows = _spread(problem.lengths[0], generator)
    for b, h in _heads(problem):
        high, low = (_rows(problem, t, sample, b, h, rows, low=flag) for flag in (False, True))
        wrong = compare("out", t.out[b, h, rows], high.out, low.out)
        if wrong is None and problem.stats:
            wrong = compare_lse(t.stats[b, h, rows, 0], high.lse, low.lse)
        if wrong is not None:
            return f"{wrong} (batch {b}, head {h})"
    return None


def _check_backward(plan: Runnable, t: Tensors, sample: Sample) -> str | None:
    problem = plan.problem
    gradients = tuple(spec.empty(t.query.device).fill_(math.nan) for spec in plan.outputs)
    inputs = (t.query, t.key, t.value, t.out, t.stats, t.grad)
    _run(plan, inputs, gradients, sample)
    generator = torch.Generator(t.query.device).manual_seed(SEED)
    rows, columns = (_spread(n, generator) for n in problem.lengths)
    group = problem.query.shape[1] // problem.key.shape[1]
    for b, h in _heads(problem):
        high, low = (_rows(problem, t, sample, b, h, rows, low=flag) for flag in (False, True))
        wrong = compare("dQ", gradients[0][b, h, rows], high.dq, low.dq, bool(t.shift))
        kv_high, kv_low = (_columns(problem, t, sample, b, h // group, columns, low=flag) for flag in (False, True))
        for i, name in ((0, "dK"), (1, "dV")):
            found = gradients[i + 1][b, h // group, columns]
            wrong = wrong or compare(name, found, kv_high[i], kv_low[i], bool(t.shift) and name == "dK")
        if wrong is not None:
            return f"{wrong} (batch {b}, head {h})"
    return None


def compare(name: str, found: torch.Tensor, exact: Block, stock: Block, noisy: bool = False) -> str | None:
    """What is wrong with `found` [N, D], or None. With `noisy`, component 0 is only asked to be finite.

    Where the exact value overflows or stock precision has no finite value, nothing can be asked of the plan.
    """
    judged = exact.value.isfinite().all(-1) & stock.value.isfinite().all(-1) & exact.step.isfinite()
    values, right, low = (t.to(torch.float64)[judged] for t in (found, exact.value, stock.value))
    noise = (exact.noise + torch.zeros_like(exact.value))[judged]
    if right.numel() == 0:
        return None
    if not bool(values.isfinite().all()):
        return f"{name} is not finite in {int((~values.isfinite()).any(-1).sum())} of {len(values)} sampled rows"
    if noisy:
        values, right, low, noise = (t[:, 1:] for t in (values, right, low, noise))
    epsilon, scale = EPSILON[found.dtype], right.norm()
    error, allowed = (values - right).norm(), TOTAL_FACTOR * (low - right).norm() + 1e-2 * epsilon * scale
    if error > allowed + noise.norm():
        return f"{name} is off by {_ratio(error, scale)}, stock precision by {_ratio((low - right).norm(), scale)}"
    usual = scale / math.sqrt(len(right))  # rows that are nothing beside the usual one may underflow
    steps = exact.step[judged] + epsilon * (right.norm(dim=-1) + 0.1 * usual)
    over = (values - right).norm(dim=-1) - ROW_STEPS * (steps + noise.norm(dim=-1))
    row = int(over.argmax())
    if over[row] <= 0:
        return None
    return f"one row of {name} is off by {_ratio((values - right)[row].norm(), right[row].norm())}"


def compare_lse(found: torch.Tensor, exact: torch.Tensor, stock: torch.Tensor) -> str | None:
    """What is wrong with natural log-sum-exps [N], or None; -inf must be met exactly."""
    if not torch.equal(found == -math.inf, exact == -math.inf):
        return "the LSE is -inf in other rows than it should be"
    judged = exact.isfinite() & stock.isfinite()
    error = (found.to(torch.float64) - exact)[judged].abs()
    allowed = 2e-3 + 1e-5 * exact[judged].abs() + 4 * (stock.to(torch.float64) - exact)[judged].abs()
    bad = ~(error <= allowed)
    return f"the LSE is off by up to {float(error.max()):.2g}" if bool(bad.any()) else None


def _ratio(error: torch.Tensor, scale: torch.Tensor) -> str:
    return f"{float(error / scale):.2g}" if scale > 0 else f"{float(error):.2g} (exact: 0)"
