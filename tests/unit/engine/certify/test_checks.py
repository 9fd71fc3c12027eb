"""Certification's verdicts are the same however many regimes, and heads of one, are computed at a time.

Knows nothing of how much work that is.
"""

from dataclasses import replace

import pytest
import torch

from cudnn_flex_compile.engine.certify import checks, slices
from cudnn_flex_compile.engine.certify.certify import certify
from cudnn_flex_compile.engine.certify.reference import ProgramReference
from cudnn_flex_compile.engine.certify.regimes import REGIMES
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from tests.unit.engine.certify.test_certify import PROGRAM, StandIn, problem
from tests.unit.engine.plans.test_learned import Plan, learned, operand

pytestmark = pytest.mark.any_torch
FIVE = tuple(regime for regime in REGIMES if not regime.extremes)
LIMITS = {
    "all regimes": (len(REGIMES), slices.PAIRS_AT_ONCE),
    "one regime": (1, slices.PAIRS_AT_ONCE),
    "one head of one regime": (1, 1),
    "two regimes": (2, slices.PAIRS_AT_ONCE),
}


def limit(monkeypatch, regimes, heads):
    """So many regimes, and heads of one, are computed at a time, as far as they may be."""
    monkeypatch.setattr(slices, "PAIRS_AT_ONCE", heads)
    monkeypatch.setattr(checks, "regimes_at_once", lambda slices: 1 if len(slices) > 1 else regimes)


@pytest.fixture(params=LIMITS)
def limits(request, monkeypatch):
    limit(monkeypatch, *LIMITS[request.param])


class WrongOnce(Plan):
    """One head of what it writes is too large in one regime."""

    def __init__(self, problem, regime, number):
        super().__init__(problem)
        self.runs, self.regime, self.number = 0, regime, number

    def run(self, tensors, *rest):
        super().run(tensors, *rest)
        written = tensors[3:] if self.problem.direction == FORWARD else tensors[6:]
        if self.runs == self.regime:
            written[self.number][-1, -1].mul_(1.3)
        self.runs += 1


HEADS = "batch 1, head 3", "batch 1, head 2"  # the last head, and the first sampled one of the last kv head
WRITTEN = {
    "out": (FORWARD, 0, HEADS[0]), "the LSE": (FORWARD, 1, HEADS[0]), "dQ": (BACKWARD, 0, HEADS[0]),
    "dK": (BACKWARD, 1, HEADS[1]), "dV": (BACKWARD, 2, HEADS[1]), "dBias": (BACKWARD, 3, HEADS[0]),
}  # fmt: skip


def of_learned(direction):
    return problem(learned("causal"), direction, (operand("hqk"),))


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize("regime", range(len(FIVE)))
@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_wrong_is_told_with_its_regime_and_head(name, regime):
    direction, number, head = WRITTEN[name]
    plan, right = WrongOnce(of_learned(direction), regime, number), StandIn(of_learned(FORWARD))
    found = certify(plan, plan if direction == FORWARD else right, ProgramReference(learned("causal")), FIVE)
    told = f"stand-in, {direction}, {FIVE[regime].name}: {name} is off by "
    assert found.detail.startswith(told)
    assert found.detail.endswith(f"({head})")


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_errors_are_the_same_however_many_are_computed_at_a_time(direction, monkeypatch):
    found = []
    for limits in LIMITS.values():
        limit(monkeypatch, *limits)
        plan = Plan(of_learned(direction))
        right = plan if direction == FORWARD else StandIn(of_learned(FORWARD))
        assert certify(plan, right, ProgramReference(learned("causal"))) is None
        found.append([error.found for error in plan.errors])
    for errors in found[1:]:
        assert errors == pytest.approx(found[0], rel=1e-9)


@pytest.mark.usefixtures("limits")
def test_right_sums_pass_and_wrong_ones_do_not():
    """Over the heads of a kv head, and those that share an entry of a bias."""
    program = learned("soft cap, causal")
    given, right = (replace(of_learned(d), program=program) for d in (BACKWARD, FORWARD))
    assert certify(Plan(given), StandIn(right), ProgramReference(program)) is None
    wrong = Plan(given, lambda g: g * torch.where(torch.arange(90) == 64, 3.0, 1.0))
    assert "dBias is off by" in certify(wrong, StandIn(right), ProgramReference(program)).detail


class WrongTwice(StandIn):
    """Too large in two regimes, and beyond its end in the second, which is computed with the first or after it."""

    def run(self, tensors, *rest):
        super().run(tensors, *rest)
        self.runs = getattr(self, "runs", 0) + 1
        if self.runs in (2, 4):
            tensors[6].mul_(1.3)
        if self.runs == 4:
            torch.empty(0, dtype=torch.bfloat16).set_(tensors[6].untyped_storage())[0] = 0.0


@pytest.mark.usefixtures("limits")
def test_of_several_things_that_are_wrong_the_first_is_told():
    plan, forward = WrongTwice(problem(PROGRAM, BACKWARD)), StandIn(problem(PROGRAM, FORWARD))
    assert f"{FIVE[1].name}: dQ is off by" in certify(plan, forward, ProgramReference(PROGRAM), FIVE).detail
    plan = WrongTwice(problem(PROGRAM, BACKWARD))
    plan.runs = 2
    told = certify(plan, forward, ProgramReference(PROGRAM), FIVE).detail
    assert f"{FIVE[1].name}: 1 entries beside dQ were written to" in told
