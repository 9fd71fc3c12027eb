"""Certification: runs a plan on made-up data at its own shape and compares sampled rows and columns.

Knows nothing of strategies. The data (regimes.py) is of several kinds, each of which has shown what others hide; the
places (places.py) are those where plans go wrong. The reference (expected.py) is float64, and the yardstick what the
same computation gives in the precision of stock attention (compare.py). All of it is enqueued before anything is read
back. Memory is that of the problem's own tensors plus O(samples x length).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from cudnn_flex_compile.engine.compare import Finding, errors_of, first_wrong, of_log_sums, of_memory, of_rows
from cudnn_flex_compile.engine.expected import (
    expected_bias,
    expected_columns,
    expected_dq,
    expected_rows,
    group_of,
    slope_error,
)
from cudnn_flex_compile.engine.places import SEED, Places, places
from cudnn_flex_compile.engine.problem import BACKWARD, Problem, TensorSpec
from cudnn_flex_compile.engine.record import Error
from cudnn_flex_compile.engine.reference import Reference, Sample
from cudnn_flex_compile.engine.regimes import (
    REGIMES,
    Regime,
    Tensors,
    applied,
    drawn,
    poison,
    poisoned,
    surrounded,
)
from cudnn_flex_compile.engine.rows import rows_of
from cudnn_flex_compile.reasons import Code, Reason


class Runnable(Protocol):
    """What is certified: a plan, or whatever stands in for one."""

    problem: Problem
    strategy: str
    outputs: tuple[TensorSpec, ...]
    device: torch.device
    errors: tuple[Error, ...]

    def run(
        self, tensors: Sequence[torch.Tensor], operands: Sequence[torch.Tensor], ints: Sequence[int],
        floats: Sequence[torch.Tensor],
    ) -> None: ...  # fmt: skip


@dataclass(frozen=True, slots=True)
class Data:
    """Values of a program's operands, and what belongs to them.

    Attributes:
        where: what is compared; the mask may depend on the operands.
        off: the slope_error of these operands, 0-d; 0 in a forward.
    """

    sample: Sample
    where: Places
    off: torch.Tensor


def certify(
    plan: Runnable, forward: Runnable, reference: Reference, regimes: Sequence[Regime] = REGIMES
) -> Reason | None:  # fmt: skip
    """None if the plan is right on every sample, which then has its `errors`; else what is wrong.

    Args:
        plan: the plan under test.
        forward: the plan itself, or for a backward a certified forward of the same call.
        reference: where the expected values come from.
        regimes: kinds of data.
    """
    problem = plan.problem
    generator = torch.Generator(plan.device).manual_seed(SEED)
    tensors = drawn(problem, generator)
    at_random = _data(problem, tensors, reference.sample(problem, generator))
    findings: list[Finding] = []
    for regime in regimes:
        data = at_random
        if regime.extremes:
            if not _varies(at_random.sample):
                continue
            data = _data(problem, tensors, reference.sample(problem, generator, extremes=True))
        with applied(regime, tensors, problem.scale):
            findings += _findings(plan, forward, tensors, regime, data)
    wrong = first_wrong(findings, at_random.where.names)
    if wrong is not None:
        return Reason(Code.CERTIFICATION, f"{plan.strategy}, {problem.direction}, {wrong}")
    plan.errors = errors_of(findings)
    return None


def _varies(sample: Sample) -> bool:
    return bool(sample.operands or sample.ints or sample.floats)


def _data(problem: Problem, tensors: Tensors, sample: Sample) -> Data:
    sample = replace(sample, operands=[surrounded(operand) for operand in sample.operands])
    where = places(problem, sample, tensors.query.device)
    backward = problem.direction == BACKWARD
    none = torch.zeros((), dtype=torch.float64, device=tensors.query.device)
    return Data(sample, where, slope_error(problem, sample, tensors, where) if backward else none)


def _findings(plan: Runnable, forward: Runnable, t: Tensors, regime: Regime, data: Data) -> list[Finding]:
    """Runs a plan on the data of a regime; what is found of everything that it writes."""
    poison(t.out)
    poison(t.stats)
    _run(forward, (t.query, t.key, t.value), (t.out, t.stats), data.sample)
    if plan.problem.direction == BACKWARD:
        return list(_of_backward(plan, t, regime, data))
    return list(_of_forward(plan.problem, t, regime, data))


def _run(plan: Runnable, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], sample: Sample) -> None:
    wanted = outputs if plan.problem.direction == BACKWARD or plan.problem.stats else outputs[:1]
    plan.run((*inputs, *wanted), sample.operands, sample.ints, sample.floats)


def _of_forward(problem: Problem, t: Tensors, regime: Regime, data: Data) -> Iterator[Finding]:
    where = data.where
    at = (where.batches[:, None], where.heads[:, None], where.rows)
    (exact, exact_lse), (stock, stock_lse) = (
        expected_rows(problem, t, data.sample, where, low=flag) for flag in (False, True)
    )
    yield of_rows(regime, "out", t.out[at], exact, stock)
    yield of_memory(regime, "out", t.out)
    if problem.stats:
        yield of_log_sums(regime, t.stats[at][..., 0], exact_lse, stock_lse)
        yield of_memory(regime, "the LSE", t.stats)


def _of_backward(plan: Runnable, t: Tensors, regime: Regime, data: Data) -> Iterator[Finding]:
    problem, where, noisy = plan.problem, data.where, bool(regime.shift)
    gradients = tuple(poisoned(spec, t.query.device) for spec in plan.outputs)
    rows = [surrounded(r) for r in rows_of(t.stats, t.grad_lse if problem.lse_gradient else None)]
    _run(plan, (t.query, t.key, t.value, t.out, t.stats, t.grad, *rows), gradients, data.sample)
    for gradient, label in zip(gradients, ("dQ", "dK", "dV", "dBias"), strict=False):
        yield of_memory(regime, label, gradient)
    batches, kv_heads = where.batches[:, None], where.heads[:, None] // group_of(problem)
    dq, dk, dv, *dbias = gradients
    exact, stock = (expected_dq(problem, t, data.sample, where, flag, data.off) for flag in (False, True))
    yield of_rows(regime, "dQ", dq[batches, where.heads[:, None], where.rows], exact, stock, noisy)
    columns = (expected_columns(problem, t, data.sample, where, flag, data.off) for flag in (False, True))
    (exact_dk, exact_dv), (stock_dk, stock_dv) = columns
    yield of_rows(regime, "dK", dk[batches, kv_heads, where.columns], exact_dk, stock_dk, noisy)
    yield of_rows(regime, "dV", dv[batches, kv_heads, where.columns], exact_dv, stock_dv)
    for gradient in dbias:
        yield from _of_bias(problem, t, regime, data, gradient)


def _of_bias(problem: Problem, t: Tensors, regime: Regime, data: Data, dbias: torch.Tensor) -> Iterator[Finding]:
    where, spec = data.where, TensorSpec.of(dbias)
    near = (where.batches[:, None] * (spec.shape[0] > 1), where.heads[:, None] * (spec.shape[1] > 1))
    exact, stock = (expected_bias(problem, t, data.sample, where, spec, flag) for flag in (False, True))
    yield of_rows(regime, "dBias", dbias[(*near, where.rows)], exact[0], stock[0])
    yield of_rows(regime, "dBias", dbias.mT[(*near, where.columns)], exact[1], stock[1])
