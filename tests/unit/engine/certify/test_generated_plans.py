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
from tests.support import vectors
from tests.support.generated import call
from tests.unit.engine.certify.test_certify import StandIn

__all__ = ["fresh"]

NUMBERS = (3, 7, 11, 19, 23, 42, 57, 64)


def judged(monkeypatch, attention, inputs):
    """The problem and the reference of a call, as passes/decide/candidate.py makes them; None if it is kept before."""
    found = []

    def judge(judged):
        problem = candidate.problem_of(candidate.forward_call(judged, judged.running, torch.device("cpu")))
        found.append((problem, candidate._reference(judged), judged.training))
        return real(judged)

    real = contenders.plan_or_reason
    monkeypatch.setattr(contenders, "plan_or_reason", judge)
    torch.compile(attention, backend="cudnn_flex", options={"inner_backend": "eager", "lower": "always"})(*inputs)
    return found[0] if found else None


@pytest.mark.parametrize("number", NUMBERS)
def test_right_plans_pass(number, monkeypatch):
    case = call(number)
    with torch.no_grad():
        assert_passes(judged(monkeypatch, case.attention("cpu"), case.inputs("cpu")[:3]))


@pytest.mark.parametrize("number", [0, 5, 7, 16])
def test_right_plans_of_longer_heads_pass(number, monkeypatch, trainable):
    """The user's functions add dots of vectors, which are in the raw score of the plans."""
    case = vectors.drawn(number)
    with torch.enable_grad():
        found = judged(monkeypatch, case.attend(), case.leaves())
    assert found[0].query.shape[3] > case.tensors["query"].shape[3]
    assert found[2]
    assert_passes(found)


def assert_passes(found):
    problem, reference, _ = found
    forward, backward = StandIn(problem.forward()), StandIn(problem.backward())
    assert forward.problem.direction == FORWARD
    assert certify(forward, forward, reference) is None
    assert backward.problem.direction == BACKWARD
    assert certify(backward, forward, reference) is None
