"""Which graphs are tried for a problem, and that none is tried twice. Plans are built by a stand-in that refuses all.

Knows nothing of cuDNN's verdicts.
"""

from dataclasses import replace

import pytest
import torch

from cudnn_flex_compile.config import GRAPHS
from cudnn_flex_compile.engine.certify.reference import ProgramReference
from cudnn_flex_compile.engine.choose import Policy, choose
from cudnn_flex_compile.engine.graph.strategies import STRATEGIES
from cudnn_flex_compile.engine.plans import graph_plan
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, Problem, TensorSpec, dense, out_spec
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, I32, Program
from cudnn_flex_compile.scoremod.learned import with_bias
from cudnn_flex_compile.scoremod.masks.linear import KV, Q
from cudnn_flex_compile.scoremod.optable import make

BATCH, HEADS, LENGTH = 2, 4, 256
BF16 = torch.bfloat16
WITH_LSE = "backward with a gradient of the log-sum-exp"
CAPPED = make("tanh", ir.SCORE / 20.0) * 20.0
CAUSAL = make("ge", Q, KV)
HEAD_BIAS = ir.SCORE + ir.operand(0, F32, "h") * ir.cast(Q - KV, F32)
FULL_BIAS = ir.SCORE + ir.operand(0, F32, "bhqk")


def problem(program: Program, direction: str, *operands: tuple[int, ...]) -> Problem:
    query = dense(TensorSpec((BATCH, HEADS, LENGTH, 64), (), BF16))
    given = tuple(dense(TensorSpec(shape, (), torch.float32)) for shape in operands)
    forward = Problem(program, FORWARD, query, query, query, out_spec(query, query), given, 0.125, 0)
    return forward if direction == FORWARD else forward.backward(direction == WITH_LSE)


def test_options_name_each_strategy() -> None:
    assert {strategy.name for strategy in STRATEGIES} == set(GRAPHS) - {"parts"}


def chosen(given: Problem):
    return choose(given, None, ProgramReference(given.program), Policy())


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is built, as "strategy" or "strategy expanded"."""
    found: list[str] = []

    def build(problem, lowering):
        found.append(lowering.strategy + " expanded" * lowering.expanded)
        return Reason(Code.SHAPE_REFUSED, f"number {len(found)}")

    monkeypatch.setattr(graph_plan, "build", build)
    return found


WITHOUT = {
    "plain": ["native", "chained", "chained", "dense"], "causal": ["native", "chained", "dense", "chained", "dense"],
    "soft cap": ["chained", "chained", "dense"],
}  # fmt: skip
PROGRAMS = {"plain": ir.program(), "causal": ir.program(mask=CAUSAL), "soft cap": ir.program(CAPPED)}
TRIED = {
    "plain": (ir.program(), (), FORWARD, ["native", "chained", "chained", "dense"]),
    "causal": (ir.program(mask=CAUSAL), (), FORWARD, ["native", "chained", "dense", "chained", "dense"]),
    "soft cap": (ir.program(CAPPED), (), FORWARD, ["chained", "chained", "dense"]),
    "soft cap, backward": (ir.program(CAPPED), (), BACKWARD, ["chained", "chained", "dense"]),
    "a bias of all pairs": (
        ir.program(FULL_BIAS, CAUSAL), ((BATCH, HEADS, LENGTH, LENGTH),), FORWARD, ["chained", "dense"] * 2,
    ),
    "an operand for each head": (
        ir.program(HEAD_BIAS, CAUSAL), ((1, HEADS, 1, 1),), FORWARD,
        ["chained", "dense"] * 2 + ["chained expanded", "dense expanded"] * 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRIED)
def test_no_graph_is_tried_twice(name: str, tried: list[str]) -> None:
    """Each variant once plain and once guarded, where that may be another graph."""
    program, operands, direction, expected = TRIED[name]
    reason = chosen(problem(program, direction, *operands))
    assert isinstance(reason, Reason)
    assert reason.code is Code.SHAPE_REFUSED
    assert tried == expected


@pytest.mark.parametrize("name", PROGRAMS)
def test_plans_without_it_give_a_gradient_of_the_log_sum_exp(name: str, tried: list[str]) -> None:
    chosen(problem(PROGRAMS[name], WITH_LSE))
    assert tried == WITHOUT[name]


def test_beside_a_learned_bias_plans_without_it_give_a_gradient_of_the_log_sum_exp(tried: list[str]) -> None:
    program = ir.program(with_bias(ir.SCORE, ir.operand(0, F32, "hqk")), CAUSAL)
    reasons = [chosen(problem(program, how, (1, HEADS, LENGTH, LENGTH))) for how in (BACKWARD, WITH_LSE)]
    assert tried == ["native", "chained", "dense", "chained", "dense"] * 2
    assert all(isinstance(reason, Reason) and reason.code is Code.SHAPE_REFUSED for reason in reasons)


def test_lengths_are_not_expanded(tried: list[str]) -> None:
    program = ir.program(mask=make("gt", ir.operand(0, I32, "b"), KV))
    given = problem(program, FORWARD, (BATCH, 1, 1, 1))
    given = replace(given, operands=(replace(given.operands[0], dtype=torch.int32),))
    chosen(given)
    assert "native" in tried
    assert "native expanded" not in tried
