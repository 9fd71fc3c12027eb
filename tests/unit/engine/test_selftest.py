"""The self-test's programs: what each is there for, and whether cuDNN is asked for them at all, without a GPU."""

import pytest
import torch

from cudnn_flex_compile.config import Policy
from cudnn_flex_compile.engine import find_plan, selftest
from cudnn_flex_compile.engine.graph.strategies import STRATEGIES
from cudnn_flex_compile.engine.key import policy_of, problem_of
from cudnn_flex_compile.engine.plans.box_plan import divided
from cudnn_flex_compile.engine.plans.variants import _needs_guard
from cudnn_flex_compile.engine.problem import BACKWARD
from cudnn_flex_compile.engine.support import refused
from cudnn_flex_compile.reasons import Code, Reason

PROBLEMS = {program.name: problem_of(selftest.call_of(program, 0)) for program in selftest.PROGRAMS}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_strategy_takes_it(name):
    problem = PROBLEMS[name].backward()
    program = problem.program
    assert refused(problem, program) is None
    assert any(not isinstance(s.lower(program, True), Reason) for s in STRATEGIES)


def test_every_strategy_and_form_of_plan_takes_part():
    programs = {name: (p.program, p.backward()) for name, p in PROBLEMS.items()}
    first = {
        name: next(s.name for s in STRATEGIES if not isinstance(s.lower(program, True), Reason))
        for name, (program, _) in programs.items()
    }
    assert set(first.values()) == {"native", "chained", "dense"}
    assert [n for n, (program, p) in programs.items() if divided(program, p.lengths, BACKWARD)]
    assert [n for n, (program, p) in programs.items() if _needs_guard(program, p)]
    assert {p.query.dtype for p in PROBLEMS.values()} == {torch.bfloat16, torch.float16}
    assert {p.query.shape[1] // p.key.shape[1] for p in PROBLEMS.values()} == {1, 4}


def test_outcomes(monkeypatch):
    """Forward, then backward, each anew; the first that fails ends the program, not the test."""
    asked, policies = [], set()

    def found(key):
        asked.append(key[0])
        policies.add(policy_of(key))
        if len(asked) == 2:
            return Reason(Code.CERTIFICATION, "wrong")
        return find_plan.CachedPlan(type("Plan", (), {"strategy": "native"})(), (False,) * 4)

    monkeypatch.setattr(find_plan, "find_plan", found)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    outcomes = list(selftest.run(0))
    assert policies == {Policy(certify="always")}, "no other compile's plans"
    assert [o.name for o in outcomes] == [p.name for p in selftest.PROGRAMS]
    assert [str(o.reason) for o in outcomes if o.reason] == ["CERTIFICATION: wrong"]
    assert outcomes[0].strategies == ("native",)
    assert all(o.strategies == ("native", "native") for o in outcomes[1:])
    assert asked[:3] == ["forward", "backward", "forward"]
