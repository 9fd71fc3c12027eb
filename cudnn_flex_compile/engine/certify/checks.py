"""The checks of a plan: which rows and columns of its results are compared, with which expected values, and when.

certify.py makes them. A check keeps the data of each regime until it has as many regimes as may be compared at once
(slices.py), or until the last one.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from cudnn_flex_compile.engine.certify.compare import Finding, of_changes, of_log_sums, of_rows
from cudnn_flex_compile.engine.certify.expected import (
    expected_bias,
    expected_columns,
    expected_dq,
    expected_rows,
    slopes,
)
from cudnn_flex_compile.engine.certify.reference import Sample
from cudnn_flex_compile.engine.certify.regimes import Regime, Tensors
from cudnn_flex_compile.engine.certify.samples import SamplePlan
from cudnn_flex_compile.engine.certify.slices import (
    Slice,
    SliceData,
    concatenated,
    regimes_at_once,
    sharers_of,
    slice_data,
    slice_of_rows,
    slices_of_bias,
    slices_of_columns,
)
from cudnn_flex_compile.engine.problem import Problem, TensorSpec

Found = tuple[torch.Tensor, ...]
Judge = Callable[[Sequence[Regime], Iterable[SliceData], Found], Iterator[Finding]]


@dataclass(slots=True)
class Check:
    """A question about the data of each regime.

    Attributes:
        slices: the slices of the problem that are computed for it, one at a time.
        written: each tensor that the plan wrote, and the index of the part that is compared.
        judge: compares the expected values of some regimes with those that the plan wrote, [K * N, R, D] each.
        findings: the results for the regimes that have been compared.
    """

    problem: Problem
    slices: Sequence[Slice]
    written: Sequence[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]
    judge: Judge
    findings: list[Finding] = field(default_factory=list[Finding])
    _regimes: list[Regime] = field(default_factory=list[Regime])
    _given: list[SliceData] = field(default_factory=list[SliceData])
    _found: list[Found] = field(default_factory=list[Found])

    def add(self, regime: Regime, t: Tensors) -> None:
        """Copies a regime's data, which may change afterwards."""
        self._regimes.append(regime)
        self._found.append(tuple(tensor[index] for tensor, index in self.written))
        if len(self.slices) > 1:
            self._compare(slice_data(self.problem, t, piece) for piece in self.slices)
        else:
            self._given.append(slice_data(self.problem, t, self.slices[0]))

    def compare(self, last: bool = False) -> None:
        """Compares the regimes that wait, if they are as many as may be compared at once, or the last ones."""
        if self._regimes and (last or len(self._regimes) >= regimes_at_once(self.slices)):
            given, self._given = concatenated(self._given), []
            self._compare([given])

    def _compare(self, given: Iterable[SliceData]) -> None:
        regimes, found = self._regimes, tuple(map(torch.cat, zip(*self._found, strict=True)))
        self._regimes, self._found = [], []
        self.findings += self.judge(regimes, given, found)


def checks_of_forward(
    problem: Problem, sample: Sample, where: SamplePlan, written: Sequence[torch.Tensor]
) -> list[Check]:  # fmt: skip
    piece = slice_of_rows(problem, where)

    def judge(regimes: Sequence[Regime], parts: Iterable[SliceData], found: Found) -> Iterator[Finding]:
        (given,) = parts
        expected, sums = expected_rows(problem, sample, given)
        yield of_rows(regimes, "out", found[0], expected)
        for stats in found[1:]:
            yield of_log_sums(regimes, stats[..., 0], sums)

    return [Check(problem, [piece], [(tensor, piece.of_rows) for tensor in written], judge)]


def checks_of_backward(
    problem: Problem, sample: Sample, where: SamplePlan, t: Tensors, written: Sequence[torch.Tensor]
) -> list[Check]:  # fmt: skip
    """The tensors `t` are unit normal."""
    dq, dk, dv, *dbias = written
    of_rows_, of_columns = slice_of_rows(problem, where), slices_of_columns(problem, where)
    found = slopes(problem, sample, slice_data(problem, t, of_rows_))
    off, findings = found.error, list[Finding]()
    if found.change is not None and sample.change is not None:
        findings.append(of_changes(sample.change.at(of_rows_.where), found.change, sample.change.error))

    def judge_rows(regimes: Sequence[Regime], parts: Iterable[SliceData], found: Found) -> Iterator[Finding]:
        (given,) = parts
        yield of_rows(regimes, "dQ", found[0], expected_dq(problem, sample, given, off), noisy=True)

    def judge_columns(regimes: Sequence[Regime], parts: Iterable[SliceData], found: Found) -> Iterator[Finding]:
        of_dk, of_dv = expected_columns(problem, sample, parts, off)
        yield of_rows(regimes, "dK", found[0], of_dk, noisy=True)
        yield of_rows(regimes, "dV", found[1], of_dv)

    place = of_columns[0].of_columns
    return [
        Check(problem, [of_rows_], [(dq, of_rows_.of_rows)], judge_rows, findings),
        Check(problem, of_columns, [(dk, place), (dv, place)], judge_columns),
        *(_of_bias(problem, sample, where, gradient, side) for gradient in dbias for side in (False, True)),
    ]


def _of_bias(problem: Problem, sample: Sample, where: SamplePlan, dbias: torch.Tensor, transposed: bool) -> Check:
    """A check of the gradient of a learned operand, at sampled rows or at sampled columns."""
    spec = TensorSpec.of(dbias)
    slices, sharers = slices_of_bias(problem, where, spec, transposed), len(sharers_of(problem, spec))

    def judge(regimes: Sequence[Regime], parts: Iterable[SliceData], found: Found) -> Iterator[Finding]:
        expected = expected_bias(problem, sample, parts, len(where.heads), sharers, transposed)
        yield of_rows(regimes, "dBias", found[0], expected)

    near = (where.batches[:, None] * (spec.shape[0] > 1), where.heads[:, None] * (spec.shape[1] > 1))
    written = (dbias.mT, (*near, where.columns)) if transposed else (dbias, (*near, where.rows))
    return Check(problem, slices, [written], judge)
