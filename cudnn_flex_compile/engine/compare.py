"""Compares what a plan wrote with what it should have: numbers on the device, words once they are read back.

Knows nothing of plans or of where the numbers come from. Nothing here waits for the device but `first_wrong`, and
`errors_of` after it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cudnn_flex_compile.engine.expected import Block, LogSums
from cudnn_flex_compile.engine.pairs import EPSILON
from cudnn_flex_compile.engine.record import Error
from cudnn_flex_compile.engine.regimes import Regime, overrun, unwritten

# A plan may be this much further from float64 than stock precision is, in total. The few sampled rows of few keys
# weigh much in the total, and differ from kernel to kernel: plans that are within 2 on all rows (tests/gpu) were seen
# at 2.3 here. Wrong ones were seen at 20 and more.
TOTAL_FACTOR = 3.0
# One row may be off by this many rounding steps of the magnitudes that it sums: where they cancel, as dQ does in a
# row of two keys, rounding is large beside the sum, and differs from kernel to kernel.
ROW_STEPS = 8.0
# Where a Finding of rows has these, among its numbers.
ERROR, SIZE, STOCK_ERROR = 3, 5, 6
# What is smaller underflows in float32: a weight beside one that is e**87 times as large.
SMALLEST = 1e-30


@dataclass(frozen=True, slots=True)
class Finding:
    """Numbers of one quantity for each sampled head, [N, numbers], still on the device.

    Attributes:
        regime: of the data.
        judge: says what is wrong with one head's numbers, or None.
        quantity: what it is of, if its error is worth a report.
    """

    regime: str
    numbers: torch.Tensor
    judge: Callable[[list[float]], str | None]
    quantity: str = ""


def first_wrong(findings: Sequence[Finding], heads: Sequence[str]) -> str | None:
    """What is wrong, with its regime and head: the first finding. Waits for the device once."""
    if not findings:
        return None
    numbers = iter(torch.cat([f.numbers.flatten() for f in findings]).tolist())
    wrong: str | None = None
    for finding in findings:
        for row in range(finding.numbers.shape[0]):
            verdict = finding.judge([next(numbers) for _ in range(finding.numbers.shape[1])])
            where = f" ({heads[row]})" if finding.numbers.shape[0] == len(heads) else ""
            wrong = wrong or (verdict and f"{finding.regime}: {verdict}{where}")
    return wrong


def _numbers(*of_heads: torch.Tensor) -> torch.Tensor:
    return torch.stack([n.to(torch.float64) for n in of_heads], dim=-1)


def of_rows(regime: Regime, name: str, found: torch.Tensor, exact: Block, stock: Block, noisy: bool = False) -> Finding:
    """Of rows [N, R, D] of one quantity. With `noisy`, component 0 is only asked to be finite, and zero where hidden.

    Where the exact value overflows, stock precision has no finite value, or float32 scores leave nothing of it (the
    noise is as large as what is summed: scores of a million, say), nothing can be asked of the plan, but that an
    output of usual data is NaN where both are, in all of the row.
    """
    judged = (exact.value.isfinite() & stock.value.isfinite()).all(-1) & exact.step.isfinite()
    judged &= exact.noise.norm(dim=-1) <= exact.step / EPSILON[found.dtype]
    values, right, low, noise = (
        torch.where(judged[..., None], x.to(torch.float64), 0.0) for x in (found, exact.value, stock.value, exact.noise)
    )
    infinite = (judged & ~found.isfinite().all(-1)).sum(-1)
    visible_nothing = (exact.hidden & (found != 0).any(-1)).sum(-1)
    lost = ((exact.value.isnan() & stock.value.isnan()).all(-1) & ~found.isnan().all(-1)).sum(-1)
    lost = lost * (regime.usual and name == "out")
    if noisy:
        values, right, low, noise = (x[..., 1:] for x in (values, right, low, noise))
    epsilon, size, stock_error = EPSILON[found.dtype], _norm(right), _norm(low - right)
    allowed = TOTAL_FACTOR * stock_error + 1e-2 * epsilon * size + _norm(noise) + SMALLEST
    usual = size / judged.sum(-1).clamp(min=1).sqrt()  # rows that are nothing beside the usual one may underflow
    errors, sizes = (values - right).norm(dim=-1), right.norm(dim=-1)
    steps = torch.where(judged, exact.step, 0.0) + epsilon * (sizes + 0.1 * usual[:, None]) + SMALLEST
    over, row = (errors - ROW_STEPS * (steps + noise.norm(dim=-1))).max(-1, keepdim=True)
    worst = (over[:, 0], errors.gather(-1, row)[:, 0], sizes.gather(-1, row)[:, 0])
    total = (_norm(values - right), allowed, size, stock_error)
    numbers = _numbers(infinite, visible_nothing, lost, *total, *worst)
    return Finding(regime.name, numbers, lambda n: _judge_rows(name, n), name if regime.usual else "")


def errors_of(findings: Sequence[Finding]) -> tuple[Error, ...]:
    """How far results were off on usual data, over all sampled heads. Waits for the device."""
    kept = [finding for finding in findings if finding.quantity]
    totals = [finding.numbers[:, [ERROR, SIZE, STOCK_ERROR]].norm(dim=0).tolist() for finding in kept]
    return tuple(
        Error(finding.quantity, found / size, stock / size)
        for finding, (found, size, stock) in zip(kept, totals, strict=True) if size > 0
    )  # fmt: skip


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1).norm(dim=-1)


def _judge_rows(name: str, numbers: list[float]) -> str | None:
    infinite, visible_nothing, lost, error, allowed, size, stock_error, over, row_error, row_size = numbers
    if infinite:
        return f"{name} is not finite in {infinite:.0f} sampled rows"
    if visible_nothing:
        return f"{name} is not zero in {visible_nothing:.0f} sampled rows without a visible pair"
    if lost:
        return f"{name} is not NaN in {lost:.0f} sampled rows where it should be"
    if not error <= allowed:
        return f"{name} is off by {_ratio(error, size)}, stock precision by {_ratio(stock_error, size)}"
    return f"one row of {name} is off by {_ratio(row_error, row_size)}" if not over <= 0 else None


def _ratio(error: float, size: float) -> str:
    return f"{error / size:.2g}" if size > 0 else f"{error:.2g} (exact: 0)"


def of_log_sums(regime: Regime, found: torch.Tensor, exact: LogSums, stock: LogSums) -> Finding:
    """Of natural log-sum-exps [N, R]; -inf must be met exactly, and NaN on usual data."""
    judged = exact.value.isfinite() & stock.value.isfinite()
    error = (found.to(torch.float64) - exact.value).abs()
    allowed = 2e-3 + 1e-5 * exact.value.abs() + 4 * (stock.value.to(torch.float64) - exact.value).abs() + exact.noise
    beyond = judged & ~(error <= allowed)
    others = (found == -math.inf) != (exact.value == -math.inf)
    if regime.usual:
        others |= (exact.value.isnan() == stock.value.isnan()) & (found.isnan() != exact.value.isnan())
    worst = torch.where(beyond, error, 0.0).amax(-1)
    return Finding(regime.name, _numbers(others.sum(-1), beyond.sum(-1), worst), _judge_log_sums)


def _judge_log_sums(numbers: list[float]) -> str | None:
    others, beyond, worst = numbers
    if others:
        return "the LSE is -inf or NaN in other rows than it should be"
    return f"the LSE is off by up to {worst:.2g}" if beyond else None


def of_memory(regime: Regime, name: str, tensor: torch.Tensor) -> Finding:
    """Of a whole tensor that was poisoned: all of it must be written to, and nothing beside it."""

    def judge(numbers: list[float]) -> str | None:
        missed, beyond = numbers
        if missed:
            return f"{name} has {missed:.0f} unwritten entries"
        return f"{beyond:.0f} entries beside {name} were written to" if beyond else None

    return Finding(regime.name, _numbers(unwritten(tensor), overrun(tensor))[None], judge)
