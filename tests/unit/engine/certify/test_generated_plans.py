"""Certification passes plans that are right, whatever functions a call has: generated calls, with the program itself,
computed on the CPU, in place of a plan. The reference are the user's functions, as at compile time.
"""

import pytest
import torch

from cudnn_flex_compile.engine.certify.certify import certify
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.passes import contenders
from cudnn_flex_compile.passes.decide import candidate
from tests.compile.test_backend import fresh
from tests.support.generated import call
from tests.unit.engine.certify.test_certify import StandIn

__all__ = ["fresh"]

NUMBERS = (3, 7, 11, 19, 23, 42, 57, 64)


def judged(monkeypatch, number):
    """The problem and the reference of a generated call, as passes/decide/candidate.py makes them; None if it is kept
    before.
    """
    found = []

    def judge(judged):
        problem = candidate.problem_of(candidate.forward_call(judged, judged.running, torch.device("cpu")))
        found.append((problem, candidate._reference(judged), judged.training))
        return real(judged)

    real = contenders.plan_or_reason
    monkeypatch.setattr(contenders, "plan_or_reason", judge)
    case = call(number)
    options = {"inner_backend": "eager", "lower": "always"}
    attention = torch.compile(case.attention("cpu"), backend="cudnn_flex", options=options)
    with torch.no_grad():
        attention(*case.inputs("cpu")[:3])
    return found[0] if found else None


@pytest.mark.parametrize("number", NUMBERS)
def test_right_plans_pass(number, monkeypatch):
    problem, reference, _ = judged(monkeypatch, number)
    forward, backward = StandIn(problem.forward()), StandIn(problem.backward())
    assert forward.problem.direction == FORWARD
    assert certify(forward, forward, reference) is None
    assert backward.problem.direction == BACKWARD
    assert certify(backward, forward, reference) is None
