"""A learned operand's gradient from that of each pair: which calls need it, the graphs, the sums, and what is caught.

Knows nothing of cuDNN: plans are stand-ins on the CPU, graphs are computed by tests/support/emulator.py.
"""

import math
from dataclasses import replace

import pytest
import torch

from cudnn_flex_compile.engine.certify.certify import certify
from cudnn_flex_compile.engine.certify.reference import ProgramReference
from cudnn_flex_compile.engine.graph.strategies import STRATEGIES
from cudnn_flex_compile.engine.guards import guarded
from cudnn_flex_compile.engine.plans import pair_gradient
from cudnn_flex_compile.engine.plans.folded_output import FoldedPlan
from cudnn_flex_compile.engine.plans.pair_gradient import FORMS, PairGradientPlan, needed, running
from cudnn_flex_compile.engine.plans.plan import Attempt, Record
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, output_specs
from cudnn_flex_compile.kernels import cpu
from cudnn_flex_compile.kernels.arguments import Arguments
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32
from cudnn_flex_compile.scoremod.learned import added, position, with_bias
from cudnn_flex_compile.scoremod.text import text
from tests.support.emulator import emulated
from tests.unit.engine.certify.test_certify import CAPPED, StandIn, problem
from tests.unit.engine.plans.test_learned import GRAPHS, PROGRAMS, SHARED, SIZES, learned, operand
from tests.unit.engine.plans.test_lse_gradient import attention

pytestmark = pytest.mark.any_torch


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(pair_gradient, "empty", lambda n, stride, dtype: torch.empty_strided(n, stride, dtype=dtype))


class Inner(StandIn):
    """The CPU kernels, as a graph whose gradient of each pair leaves it by a node. `skip` are pairs that it leaves as
    they are, and `spoil` may change the others.
    """

    def __init__(self, problem, spoil=lambda pairs: pairs, skip=None):
        super().__init__(problem)
        self.outputs, self.spoil, self.skip = output_specs(problem), spoil, skip

    def run(self, tensors, operands, ints, floats):
        query, key, value, out, stats, grad, *gradients, pairs = tensors
        assert pairs.dtype == torch.float32
        whole = [operands[0].float().expand(pairs.shape).contiguous(), *operands[1:]]
        score = self.problem.program.score.args[0]
        program = ir.program(with_bias(score, ir.operand(0, F32, "bhqk")), self.problem.program.mask)
        rest = Arguments(whole, ints, floats, text(program), self.problem.scale)
        found = cpu.backward(grad, None, query, key, value, out, stats.squeeze(-1), rest)
        for into, gradient in zip(gradients, found[:3], strict=True):
            into.copy_(gradient)
        computed = self.spoil(found[3]) / FORMS[self.problem.pairs]
        pairs.copy_(computed if self.skip is None else torch.where(self.skip, pairs, computed))


def verdict(program, dims="hqk", dtype=torch.bfloat16, form="identity", lse_gradient=False, **how):
    given = (operand(dims),)
    forward, backward = (problem(program, d, given, dtype=dtype) for d in (FORWARD, BACKWARD))
    plan = PairGradientPlan(backward, form, Inner(PairGradientPlan.inner_problem(backward, form), **how))
    if lse_gradient:
        plan = FoldedPlan(replace(backward, lse_gradient=True), plan)
    return certify(plan, StandIn(forward), ProgramReference(program))


def test_which_calls_need_it():
    wanted = {"plain": False, "causal": False, "soft cap, causal": True, "rows without a key": True}
    for name, expected in wanted.items():
        program = learned(name)
        assert needed(program, torch.bfloat16) == expected
        assert needed(program, torch.float16)
        assert not needed(ir.program(*PROGRAMS[name]), torch.float16)
        assert position(running(program, torch.bfloat16)) == (None if expected else 0)
    assert needed(ir.program(learned("plain").score, GRAPHS["any predicate"][1]), torch.bfloat16)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", SHARED)
@pytest.mark.parametrize("name", PROGRAMS)
def test_right_plans_pass(name, dims, dtype, form):
    assert verdict(learned(name, dims), dims, dtype, form) is None


@pytest.mark.parametrize("dims", SHARED)
def test_with_a_gradient_of_the_log_sum_exp(dims):
    assert verdict(learned("soft cap, causal", dims), dims, lse_gradient=True) is None


def test_tiles_that_are_skipped_count_as_zero():
    """Their memory is not written."""
    skip = torch.arange(90) > torch.arange(70)[:, None] + 5
    assert verdict(learned("soft cap, causal"), skip=skip) is None


WRONG = {
    "nothing leaves the graph": {"skip": torch.ones(70, 90, dtype=torch.bool)},
    "behind the score_mod's backward": {"spoil": lambda pairs: pairs * 0.9},
    "of one batch entry": {"spoil": lambda pairs: pairs * torch.tensor([2.0, 0.0]).view(2, 1, 1, 1)},
    "not finite": {"spoil": lambda pairs: pairs + (pairs == 0) * math.nan},
    "of the next column": {"spoil": lambda pairs: pairs.roll(1, 3)},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_gradients_are_caught(wrong):
    assert "dBias" in verdict(learned("soft cap, causal"), **WRONG[wrong]).detail


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("name", [*GRAPHS])
def test_graphs_compute_the_program(name, guard, form):
    """The scores with the operand in them, the raw ones' gradient by autograd, and what was given at each pair."""
    score, mask = GRAPHS[name]
    program = ir.program(with_bias(score, ir.operand(0, F32, "hqk")), mask)
    specs = (operand("hqk"), operand("h"))
    random = torch.Generator().manual_seed(1)
    operands = {i: torch.randn(s.shape, generator=random) for i, s in enumerate(specs)}
    raw = torch.randn(tuple(SIZES.values()), generator=random, dtype=torch.float64).requires_grad_()
    modified, _ = attention(raw, program, operands)
    grad = torch.randn(raw.shape, generator=random, dtype=torch.float64) * (modified > -math.inf)
    (expected,) = torch.autograd.grad(modified, raw, grad)
    run, lowered = added(program), []
    for strategy in STRATEGIES:
        lowering = strategy.lower(guarded(run, (70, 90)) if guard else run, True)
        if isinstance(lowering, Reason):
            continue
        forward = problem(run, FORWARD, specs)
        backward = replace(problem(run, BACKWARD, specs), pairs=form)
        given = (raw.detach(), operands, {}, {})
        torch.testing.assert_close(emulated(forward, lowering, *given), modified, rtol=1e-6, atol=1e-6)
        pairs, found = emulated(backward, lowering, *given, grad)
        torch.testing.assert_close(found * (modified > -math.inf), expected)
        assert torch.equal(pairs * FORMS[form], grad)
        lowered.append(strategy.name)
    assert lowered
    assert "native" not in lowered


def attempts(asked):
    """Those of the kind alone, around inner ones that say what they were asked for."""
    def every(inner):
        return [Attempt(lambda: Reason(Code.SHAPE_REFUSED, inner.pairs), variant=("a",)),
                Attempt(lambda: pytest.fail("it does more work"), last_resort=True)]  # fmt: skip

    return PairGradientPlan.attempts(asked, every)


def test_what_is_tried():
    program = learned("soft cap, causal")
    backward = problem(program, BACKWARD, (operand("hqk"),))
    found = attempts(backward)
    assert [attempt().detail for attempt in found] == list(FORMS)
    assert [attempt.variant for attempt in found] == [("pairs", form, "a") for form in FORMS]
    for other in (
        backward.forward(), replace(backward, tiled=1), replace(backward, lse_gradient=True),
        problem(learned("causal"), BACKWARD, (operand("hqk"),)), problem(ir.program(CAPPED), BACKWARD),
    ):  # fmt: skip
        assert attempts(other) == []


@pytest.mark.parametrize("form", FORMS)
def test_a_stored_plan_is_built_again(form):
    backward = problem(learned("soft cap, causal"), BACKWARD, (operand("hqk"),))
    asked = []

    class Stored(Inner):
        def to_record(self):
            return Record("stand-in", self.problem.pairs)

    plan = PairGradientPlan(backward, form, Stored(PairGradientPlan.inner_problem(backward, form)))

    def restore(inner, record):
        asked.append((inner, record))
        return Stored(inner)

    again = PairGradientPlan.from_record(backward, plan.to_record(), restore)
    assert asked == [(plan.inner.problem, Record("stand-in", form))]
    assert (again._factor, again.strategy) == (plan._factor, plan.strategy)
