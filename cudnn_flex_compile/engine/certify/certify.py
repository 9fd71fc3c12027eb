"""Certification: runs a plan on made-up data at its own shape and compares sampled rows and columns.

engine/choose.py calls it for every plan before the plan runs a user's data. There are several kinds of data
(regimes.py), each of which has shown faults that others hide; the samples (samples.py) are where plans go wrong.
Expected values (expected.py) are float64; a plan may be about as far from them as stock attention's precision is
(compare.py). The plan runs on one regime after the other. Small regimes are compared together (slices.py). All work is
enqueued before anything is read back. Memory is that of the problem's own tensors plus O(samples x length).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from cudnn_flex_compile.engine.certify.checks import Check, checks_of_backward, checks_of_forward
from cudnn_flex_compile.engine.certify.compare import Counts, Finding, errors_of, first_wrong, of_memory, read
from cudnn_flex_compile.engine.certify.reference import Reference, Sample
from cudnn_flex_compile.engine.certify.regimes import (
    REGIMES,
    Poisoned,
    Regime,
    Tensors,
    applied,
    drawn,
    poisoned,
    surrounded,
)
from cudnn_flex_compile.engine.certify.samples import SEED, SamplePlan, sample_plan
from cudnn_flex_compile.engine.plans.plan import Plan
from cudnn_flex_compile.engine.problem import BACKWARD
from cudnn_flex_compile.reasons import Code, Reason

RUNS = 20  # the number of runs of a plan that must be deterministic
# The numbers that a plan may make beforehand for extreme values, such as a list of tiles (128 MiB).
ROOM = 2**25


@dataclass(frozen=True, slots=True)
class Data:
    """Values of a program's operands, the plans prepared for them, and the checks of a plan on them.

    Attributes:
        where: the rows and columns that are compared; the mask may depend on the operands.
    """

    plan: Plan
    forward: Plan
    sample: Sample
    where: SamplePlan
    asked: Sequence[Check]


@dataclass(slots=True)
class Outputs:
    """The tensors that a plan writes to, by their names in messages, and the state of their memory in each regime."""

    tensors: dict[str, Poisoned]
    regimes: list[Regime] = field(default_factory=list[Regime])
    counts: dict[str, list[Counts]] = field(default_factory=dict[str, list[Counts]])

    def note(self, regime: Regime) -> None:
        self.regimes.append(regime)
        for name, tensor in self.tensors.items():
            self.counts.setdefault(name, []).append(tensor.counts())

    def findings(self) -> Iterator[Finding]:
        return (of_memory(self.regimes, name, counts) for name, counts in self.counts.items())


def certify(
    plan: Plan, forward: Plan, reference: Reference, regimes: Sequence[Regime] = REGIMES
) -> Reason | None:  # fmt: skip
    """Certifies a plan: None if it is right on every sample, and its `errors` are set; else the reason against it.

    Args:
        plan: the plan under test.
        forward: the plan itself, or for a backward a certified forward of the same call.
        reference: computes the expected scores.
        regimes: the kinds of data.
    """
    problem = plan.problem
    generator = torch.Generator(plan.device).manual_seed(SEED)
    tensors = drawn(problem, generator)
    written = _written(plan, tensors)
    usual = _data(plan, forward, tensors, written, reference.sample(problem, generator))
    assert usual is not None, "there is room for usual values"
    data = [usual]
    for regime in regimes:
        given = usual
        if regime.extremes:
            if not _varies(usual.sample):
                continue
            given = _data(plan, forward, tensors, written, reference.sample(problem, generator, extremes=True), ROOM)
            if given is None:
                continue
            data.append(given)
        with applied(regime, tensors, problem.scale):
            _run(given, tensors, written)
            written.note(regime)
            for asked in given.asked:
                asked.add(regime, tensors)
        for asked in given.asked:
            asked.compare()
    findings = [*written.findings()]
    for asked in (asked for given in data for asked in given.asked):
        asked.compare(last=True)
        findings += asked.findings
    numbers = read(findings)
    wrong = first_wrong(findings, numbers, regimes, data[0].where.names)
    if wrong is not None:
        return Reason(Code.CERTIFICATION, f"{plan.strategy}, {problem.direction}, {wrong}")
    if problem.deterministic and not _repeats(usual, tensors, written):
        return Reason(Code.CERTIFICATION, f"{plan.strategy}, {problem.direction}, {RUNS} runs differ in their bits")
    plan.errors = errors_of(findings, numbers)
    return None


def _repeats(given: Data, tensors: Tensors, written: Outputs) -> bool:
    """Whether runs on the same data give the same bits, as torch.use_deterministic_algorithms promises."""
    first: list[torch.Tensor] = []
    different = torch.zeros((), dtype=torch.bool, device=given.plan.device)
    for _ in range(RUNS):
        _run(given, tensors, written)
        found = [outputs.memory for outputs in written.tensors.values()]
        first = first or [memory.clone() for memory in found]
        for one, another in zip(first, found, strict=True):
            different |= (one != another).any()
    return not bool(different)


def _varies(sample: Sample) -> bool:
    return bool(sample.operands or sample.ints or sample.floats)


def _written(plan: Plan, tensors: Tensors) -> Outputs:
    if plan.problem.direction == BACKWARD:
        gradients = (poisoned(spec, plan.device) for spec in plan.outputs)
        return Outputs(dict(zip(("dQ", "dK", "dV", "dBias"), gradients, strict=False)))
    of_lse = {"the LSE": tensors.stats_memory} if plan.problem.stats else {}
    return Outputs({"out": tensors.out_memory, **of_lse})


def _data(
    plan: Plan, forward: Plan, tensors: Tensors, written: Outputs, sample: Sample, room: int | None = None
) -> Data | None:
    """The tensors are unit normal. None where there is no room to prepare the plans for these values."""
    problem = plan.problem
    sample = replace(sample, operands=[surrounded(operand) for operand in sample.operands])
    values = (sample.operands, sample.ints, sample.floats)
    ready = plan.prepared(*values, room)
    before = ready if forward is plan else forward.prepared(*values, room)
    if ready is None or before is None:
        return None
    where = sample_plan(problem, sample, tensors.query.device)
    outputs = [w.tensor for w in written.tensors.values()]
    if problem.direction == BACKWARD:
        return Data(ready, before, sample, where, checks_of_backward(problem, sample, where, tensors, outputs))
    return Data(ready, before, sample, where, checks_of_forward(problem, sample, where, outputs))


def _run(given: Data, t: Tensors, written: Outputs) -> None:
    """Runs a plan on the tensors; for a backward, its forward first."""
    t.out_memory.renew()
    t.stats_memory.renew()
    sample, problem = given.sample, given.plan.problem
    values = (sample.operands, sample.ints, sample.floats)
    outputs = (t.out, t.stats)
    if problem.direction != BACKWARD and not problem.stats:
        outputs = (t.out,)
    given.forward.run((t.query, t.key, t.value, *outputs), *values)
    if problem.direction != BACKWARD:
        return
    for gradient in written.tensors.values():
        gradient.renew()
    rows = [t.grad_lse] if problem.lse_gradient else []
    gradients = (gradient.tensor for gradient in written.tensors.values())
    given.plan.run((t.query, t.key, t.value, t.out, t.stats, t.grad, *rows, *gradients), *values)
