"""Compares a plan's results with expected values: as numbers on the device, in words once these are read back.

checks.py gives it tensors, and certify.py reads its findings. Only `read` waits for the device.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from cudnn_flex_compile.engine.certify.exact import EPSILON
from cudnn_flex_compile.engine.certify.expected import Block, LogSums
from cudnn_flex_compile.engine.certify.regimes import REGIMES, Regime
from cudnn_flex_compile.engine.problem import Error

Regimes = Sequence[Regime]
Counts = tuple[torch.Tensor, torch.Tensor]  # as Poisoned.counts gives them
MEMORY = "memory of "
# The order in which faults on the data of one regime are told: the first is in the message.
ORDER = (*(MEMORY + name for name in ("dQ", "dK", "dV", "dBias")), "out", MEMORY + "out", "the LSE", MEMORY + "the LSE",
         "dQ", "dK", "dV", "dBias", "captured")  # fmt: skip
# A plan may be this much further from float64 than stock precision is, in total. The few sampled rows of few keys
# weigh much in the total, and differ from kernel to kernel: plans that are within 2 on all rows (tests/gpu) were seen
# at 2.3 here. Wrong ones were seen at 20 and more.
TOTAL_FACTOR = 3.0
# One row may be off by this many rounding steps of the magnitudes that it sums: where they cancel, as dQ does in a
# row of two keys, rounding is large beside the sum, and differs from kernel to kernel.
ROW_STEPS = 8.0
# The places of these numbers in a Finding of rows.
ERROR, SIZE, STOCK_ERROR = 3, 5, 6
# A smaller number underflows in float32: a weight beside one that is e**87 times as large.
SMALLEST = 1e-30


@dataclass(frozen=True, slots=True)
class Finding:
    """Numbers of one quantity, still on the device.

    Attributes:
        quantity: one of ORDER.
        regimes: the kinds of data, K.
        numbers: for each regime, and each sampled head or the whole tensor, [K, N or 1, numbers].
        judge: says what is wrong with one head's numbers in a regime, or None.
        errors: whether its error is worth a report.
    """

    quantity: str
    regimes: Regimes
    numbers: torch.Tensor
    judge: Callable[[Regime, list[float]], str | None]
    errors: bool = False


Numbers = list[list[list[float]]]  # as the numbers of a Finding


def read(findings: Sequence[Finding]) -> list[Numbers]:
    """The numbers of each finding. Waits for the device once."""
    if not findings:
        return []
    numbers, found = torch.cat([f.numbers.flatten() for f in findings]).tolist(), list[Numbers]()
    flat = iter(numbers)
    for finding in findings:
        regimes, heads, count = finding.numbers.shape
        found.append([[list(islice(flat, count)) for _ in range(heads)] for _ in range(regimes)])
    return found


def first_wrong(
    findings: Sequence[Finding], numbers: Sequence[Numbers], regimes: Regimes, heads: Sequence[str]
) -> str | None:  # fmt: skip
    """The first fault, with its regime and head, in the order of regimes, of ORDER and of heads; None without one."""
    wrong: list[tuple[int, int, str]] = []
    for finding, of_finding in zip(findings, numbers, strict=True):
        for regime, of_heads in zip(finding.regimes, of_finding, strict=True):
            for row, of_head in enumerate(of_heads):
                verdict = finding.judge(regime, of_head)
                where = f" ({heads[row]})" if len(of_heads) == len(heads) else ""
                if verdict is not None:
                    place = regimes.index(regime), ORDER.index(finding.quantity)
                    wrong.append((*place, f"{regime.name}: {verdict}{where}"))
    return min(wrong, key=lambda found: found[:2])[2] if wrong else None


def errors_of(findings: Sequence[Finding], numbers: Sequence[Numbers]) -> tuple[Error, ...]:
    """How far results were off on usual data, over all sampled heads."""
    errors: list[Error] = []
    for finding, of_finding in zip(findings, numbers, strict=True):
        for regime, of_heads in zip(finding.regimes, of_finding, strict=True):
            if not finding.errors or not regime.usual:
                continue
            found, size, stock = (math.hypot(*(n[i] for n in of_heads)) for i in (ERROR, SIZE, STOCK_ERROR))
            if size > 0:
                errors.append(Error(finding.quantity, found / size, stock / size))
    return tuple(errors)


def _numbers(regimes: Regimes, *of_heads: torch.Tensor) -> torch.Tensor:
    """Joins the numbers of K * N heads each into the tensor of a Finding."""
    return torch.stack([n.to(torch.float64) for n in of_heads], dim=-1).unflatten(0, (len(regimes), -1))


def of_rows(regimes: Regimes, name: str, found: torch.Tensor, expected: Block, noisy: bool = False) -> Finding:
    """Compares rows [K * N, R, D] of one quantity.

    With `noisy`, component 0 must only be finite, and zero where hidden, in regimes that have a shift.

    Some entries tell nothing of the plan: the exact value overflows, stock precision has no finite value, or the noise
    of float32 scores is as large as the sum (with scores of a million, say). There a plan must only be NaN where the
    exact and the stock output of usual data both are, in all of the row.
    """
    epsilon, exact, stock, noise = EPSILON[found.dtype], expected.value, expected.stock, expected.noise
    off = torch.stack((found - exact, stock - exact, exact, noise))  # [4, K * N, R, D]
    finite = (off.abs() < math.inf).all(-1)
    judged = finite[1] & (expected.step < math.inf) & (noise.norm(dim=-1) <= expected.step / epsilon)
    off = off.masked_fill_(~judged[..., None], 0.0)
    for number, regime in enumerate(regimes):
        if noisy and regime.shift:
            off.unflatten(1, (len(regimes), -1))[:, number, ..., 0] = 0.0
    of_rows = off.norm(dim=-1)
    errors, _, sizes, noises = of_rows.unbind()
    error, stock_error, size, of_noise = of_rows.norm(dim=-1).unbind()
    allowed = TOTAL_FACTOR * stock_error + 1e-2 * epsilon * size + of_noise + SMALLEST
    usual = size / judged.sum(-1).clamp(min=1).sqrt()  # rows far smaller than the usual one may underflow
    steps = expected.step.masked_fill(~judged, 0.0).add_(sizes + 0.1 * usual[:, None], alpha=epsilon).add_(SMALLEST)
    over, row = (errors - ROW_STEPS * (steps + noises)).max(-1, keepdim=True)
    infinite = judged & ~finite[0]
    visible_nothing = expected.hidden & (found != 0).any(-1)
    lost = _lost(found, exact, stock) if name == "out" else torch.zeros_like(error)
    counts = infinite.sum(-1), visible_nothing.sum(-1), lost
    worst = (n.squeeze(-1) for n in (over, errors.gather(-1, row), sizes.gather(-1, row)))
    numbers = _numbers(regimes, *counts, error, allowed, size, stock_error, *worst)
    return Finding(name, regimes, numbers, functools.partial(_judge_rows, name), errors=True)


def _lost(found: torch.Tensor, exact: torch.Tensor, stock: torch.Tensor) -> torch.Tensor:
    """The number of rows that should be NaN, and are not."""
    return ((exact.isnan() & stock.isnan()).all(-1) & ~found.isnan().all(-1)).sum(-1)


def _judge_rows(name: str, regime: Regime, numbers: list[float]) -> str | None:
    infinite, visible_nothing, lost, error, allowed, size, stock_error, over, row_error, row_size = numbers
    if infinite:
        return f"{name} is not finite in {infinite:.0f} sampled rows"
    if visible_nothing:
        return f"{name} is not zero in {visible_nothing:.0f} sampled rows without a visible pair"
    if lost and regime.usual:
        return f"{name} is not NaN in {lost:.0f} sampled rows where it should be"
    if not error <= allowed:
        return f"{name} is off by {_ratio(error, size)}, stock precision by {_ratio(stock_error, size)}"
    return f"one row of {name} is off by {_ratio(row_error, row_size)}" if not over <= 0 else None


def _ratio(error: float, size: float) -> str:
    return f"{error / size:.2g}" if size > 0 else f"{error:.2g} (exact: 0)"


def of_log_sums(regimes: Regimes, found: torch.Tensor, expected: LogSums) -> Finding:
    """Compares natural log-sum-exps [K * N, R]; -inf must be met exactly, and NaN on usual data."""
    exact, stock = expected.value, expected.stock
    error, stock_error, size = (found - exact).abs_(), (stock - exact).abs_(), exact.abs()
    judged = stock_error < math.inf
    allowed = 2e-3 + 1e-5 * size + 4 * stock_error + expected.noise
    beyond = judged & ~(error <= allowed)
    others = (found == -math.inf) != (exact == -math.inf)
    not_a_number = exact.isnan()
    lost = (not_a_number == stock.isnan()) & (found.isnan() != not_a_number)
    worst = error.masked_fill(~beyond, 0.0).amax(-1)
    numbers = _numbers(regimes, others.sum(-1), lost.sum(-1), beyond.sum(-1), worst)
    return Finding("the LSE", regimes, numbers, _judge_log_sums)


def _judge_log_sums(regime: Regime, numbers: list[float]) -> str | None:
    others, lost, beyond, worst = numbers
    if others or (lost and regime.usual):
        return "the LSE is -inf or NaN in other rows than it should be"
    return f"the LSE is off by up to {worst:.2g}" if beyond else None


def of_changes(found: torch.Tensor, exact: torch.Tensor, allowed: float) -> Finding:
    """Compares how scores [N, R, C] change with the captured tensors, in the first regime.

    The change depends on the program alone. Entries that are not finite, such as hidden pairs, are not compared; the
    others may be off by `allowed` times the largest one.
    """
    judged = exact.abs() < math.inf
    size, off = (x.abs().masked_fill_(~judged, 0.0).flatten(1).amax(1) for x in (exact, found - exact))
    return Finding("captured", REGIMES[:1], _numbers(REGIMES[:1], off, size, size * allowed), _judge_changes)


def _judge_changes(_: Regime, numbers: list[float]) -> str | None:
    off, size, allowed = numbers
    right = off <= allowed
    return None if right else f"the gradient of what the score_mod captured is off by {_ratio(off, size)}"


def of_memory(regimes: Regimes, name: str, counts: Sequence[Counts]) -> Finding:
    """Checks a poisoned tensor in each regime: all of it must be written to, and nothing beside it."""

    def judge(_: Regime, numbers: list[float]) -> str | None:
        missed, beyond = numbers
        if missed:
            return f"{name} has {missed:.0f} unwritten entries"
        return f"{beyond:.0f} entries beside {name} were written to" if beyond else None

    numbers = torch.stack([count for of_regime in counts for count in of_regime]).to(torch.float64)
    return Finding(MEMORY + name, regimes, numbers.view(-1, 1, 2), judge)
