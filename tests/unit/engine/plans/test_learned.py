"""Certification of a learned operand's gradient: right plans pass, and what is wrong with it shows.

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
from cudnn_flex_compile.engine.plans.folded_output import FoldedPlan
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, TensorSpec, dense, output_specs
from cudnn_flex_compile.kernels import cpu
from cudnn_flex_compile.kernels.arguments import Arguments
from cudnn_flex_compile.kernels.cpu import _blocks, per_head
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, I32
from cudnn_flex_compile.scoremod.learned import with_bias
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.text import parse
from tests.support.emulator import emulated
from tests.unit.engine.certify.test_certify import CAPPED, CAUSAL, KV, Q, StandIn, problem
from tests.unit.engine.plans.test_lse_gradient import attention

pytestmark = pytest.mark.any_torch
SIZES = {"b": 2, "h": 4, "q": 70, "k": 90}
NO_KEY = make("ge", KV - Q, ir.const(40, I32))  # rows from 50 on see nothing
PROGRAMS = {
    "plain": (ir.SCORE, ir.TRUE),
    "causal": (ir.SCORE, CAUSAL),
    "soft cap, causal": (CAPPED, CAUSAL),
    "rows without a key": (CAPPED, NO_KEY),
}
SHARED = ("qk", "hqk", "bqk", "bhqk")


def learned(name, dims="hqk"):
    score, mask = PROGRAMS[name]
    return ir.program(with_bias(score, ir.operand(0, F32, dims)), mask)


def operand(dims, dtype=torch.float32):
    shape = tuple(n if axis in dims else 1 for axis, n in SIZES.items())
    return dense(TensorSpec(shape, shape, dtype))


class Plan(StandIn):
    """The CPU kernels, whose gradient of the operand `spoil` may change before it is rounded."""

    def __init__(self, problem, spoil=lambda gradient: gradient):
        super().__init__(problem)
        self.outputs, self.change = output_specs(problem), spoil

    def run(self, tensors, operands, ints, floats):
        if self.problem.direction == FORWARD:
            super().run(tensors, operands, ints, floats)
            return
        query, key, value, out, stats, grad, *gradients = tensors
        rest = Arguments(operands, ints, floats, self.program, self.problem.scale)
        found = cpu.backward(grad, None, query, key, value, out, stats.squeeze(-1), rest)
        for into, gradient in zip(gradients[:3], found[:3], strict=True):
            into.copy_(gradient)
        gradients[3].copy_(self.change(found[3]))


class Rounded(Plan):
    """As cuDNN does it: each batch entry's and head's gradient is rounded, then their sum is."""

    def run(self, tensors, operands, ints, floats):
        super().run(tensors, operands, ints, floats)
        if self.problem.direction == FORWARD:
            return
        query, key, value, out, stats, grad, *_, dbias = tensors
        heads = query.shape[1]
        given = Arguments(operands, ints, floats, self.program, self.problem.scale)
        (block,) = _blocks(query, key, given, parse(self.program))
        weights = torch.where(stats == -math.inf, 0.0, torch.exp(block.masked - stats))
        delta = (grad.float() * out.float()).sum(-1, keepdim=True)
        found = weights * (grad.float() @ per_head(value, heads).mT - delta)
        dbias.copy_(found.to(query.dtype).float().sum_to_size(dbias.shape))


def verdict(plan, program, dims="hqk", dtype=torch.bfloat16, stored=torch.float32):
    given = (operand(dims, stored),)
    forward, backward = (problem(program, d, given, dtype=dtype) for d in (FORWARD, BACKWARD))
    return certify(plan(backward), StandIn(forward), ProgramReference(program))


@pytest.mark.parametrize("plan", [Plan, Rounded])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", SHARED)
@pytest.mark.parametrize("name", PROGRAMS)
def test_right_plans_pass(name, dims, dtype, plan):
    for stored in (torch.float32, dtype):
        assert verdict(plan, learned(name, dims), dims, dtype, stored) is None


def of_the_log_sum_exp(program, around=FoldedPlan, inner=Plan, dims="hqk"):
    given = (operand(dims),)
    forward, backward = (problem(program, d, given) for d in (FORWARD, BACKWARD))
    asked = replace(backward, lse_gradient=True)
    plan = around(asked, inner(around.inner_problem(asked)))
    return certify(plan, StandIn(forward), ProgramReference(program))


@pytest.mark.parametrize("plan", [Plan, Rounded])
@pytest.mark.parametrize("dims", SHARED)
@pytest.mark.parametrize("name", PROGRAMS)
def test_an_output_that_holds_the_log_sum_exps_gradient_passes(name, dims, plan):
    assert of_the_log_sum_exp(learned(name, dims), inner=plan, dims=dims) is None


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_gradient_without_that_of_the_log_sum_exp_is_caught(name):
    """As cuDNN gives it where a score_mod's backward adds that: to dQ and dK alone."""

    class Without(FoldedPlan):
        def run(self, tensors, *rest):
            super().run(tensors, *rest)
            unused = [torch.empty_like(t) for t in tensors[7:10]]
            self.inner.run((*tensors[:6], *unused, tensors[10]), *rest)

    found = of_the_log_sum_exp(learned(name), Without)
    assert "dBias is off by" in found.detail


def hidden_too(gradient):
    return gradient + 1e-2 * (torch.arange(90) > torch.arange(70)[:, None])


WRONG = {
    "zero": lambda g: g * 0.0,
    "negated": lambda g: -g,
    "scaled as the scores are": lambda g: g * 0.25,
    "slightly off": lambda g: g * 1.03,
    "of another head": lambda g: g.roll(1, 1),
    "of the next row": lambda g: g.roll(1, 2),
    "of the next column": lambda g: g.roll(1, 3),
    "one row": lambda g: g * torch.where(torch.arange(70)[:, None] == 64, 1.5, 1.0),
    "one column": lambda g: g * torch.where(torch.arange(90) == 64, 3.0, 1.0),
    "a tile left out": lambda g: g * ((torch.arange(70)[:, None] < 64) | (torch.arange(90) < 64)),
    "hidden pairs": hidden_too,
}


@pytest.mark.parametrize("name", ["causal", "soft cap, causal"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_gradients_are_caught(wrong, name):
    found = verdict(lambda asked: Plan(asked, WRONG[wrong]), learned(name))
    assert "dBias" in found.detail
    assert "off by" in found.detail


def test_a_sum_over_less_than_all_that_share_it_is_caught():
    """Of one batch entry in place of two, and of half of the heads."""

    class Less(Plan):
        def run(self, tensors, operands, ints, floats):
            super().run(tensors, operands, ints, floats)
            if self.problem.direction == BACKWARD:
                query, key, value, out, stats, grad, *_, dbias = tensors
                grad = grad.clone()
                grad[-1 if dbias.shape[1] > 1 else slice(None), 2 if dbias.shape[1] == 1 else 0 :] = 0.0
                rest = Arguments(operands, ints, floats, self.program, self.problem.scale)
                dbias.copy_(cpu.backward(grad, None, query, key, value, out, stats.squeeze(-1), rest)[3])

    for dims in ("qk", "hqk", "bqk"):
        assert "dBias" in verdict(Less, learned("causal", dims), dims).detail


def test_what_is_not_finite_or_not_written_is_caught():
    assert "not finite" in verdict(lambda p: Plan(p, lambda g: g + (g == 0) * math.nan), learned("causal")).detail

    class Unwritten(Plan):
        def run(self, tensors, *rest):
            kept = tensors[-1].clone() if self.problem.direction == BACKWARD else None
            super().run(tensors, *rest)
            if kept is not None:  # tiles above the diagonal are skipped
                place = torch.arange(90) >= torch.arange(70)[:, None] + 10
                integers = tensors[-1].view(torch.int16)
                integers.copy_(torch.where(place, kept.view(torch.int16), integers))

    assert "dBias has" in verdict(Unwritten, learned("causal")).detail


def test_rows_without_a_visible_pair_must_be_zero():
    spoil = lambda g: g + 1e-30 * (torch.arange(70)[:, None] >= 50)  # noqa: E731
    assert "not zero" in verdict(lambda p: Plan(p, spoil), learned("rows without a key")).detail


DISTANCE = Q - KV
GRAPHS = {
    **PROGRAMS,
    "window": (ir.SCORE, make("and", CAUSAL, make("ge", ir.const(9, I32), DISTANCE))),
    "behind": (ir.SCORE, make("ge", ir.const(9, I32), DISTANCE)),
    "shifted": (ir.SCORE, make("ge", DISTANCE, ir.const(-5, I32))),
    "symmetric": (
        ir.SCORE,
        make("and", make("ge", ir.const(9, I32), DISTANCE), make("ge", DISTANCE, ir.const(-9, I32))),
    ),
    "any predicate": (CAPPED, make("ne", make("mod", Q + KV, ir.const(3, I32)), ir.const(0, I32))),
    "chosen": (make("where", CAUSAL, ir.SCORE, ir.SCORE * 0.5), NO_KEY),
    "beside another": (ir.SCORE * ir.operand(1, F32, "h"), CAUSAL),
}


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_compute_the_program(name, guard):
    """Each strategy's: the modified scores, and from their gradient that of the raw ones, by autograd."""
    score, mask = GRAPHS[name]
    program = ir.program(with_bias(score, ir.operand(0, F32, "hqk")), mask)
    specs = (operand("hqk"), operand("h"))
    random = torch.Generator().manual_seed(1)
    operands = {i: torch.randn(s.shape, generator=random) for i, s in enumerate(specs)}
    raw = torch.randn(tuple(SIZES.values()), generator=random, dtype=torch.float64).requires_grad_()
    modified, _ = attention(raw, program, operands)
    grad = torch.randn(raw.shape, generator=random, dtype=torch.float64) * (modified > -math.inf)
    (expected,) = torch.autograd.grad(modified, raw, grad)
    lowered = []
    for strategy in STRATEGIES:
        lowering = strategy.lower(guarded(program, (70, 90)) if guard else program, True)
        if isinstance(lowering, Reason):
            continue
        forward, backward = (problem(program, direction, specs) for direction in (FORWARD, BACKWARD))
        given = (raw.detach(), operands, {}, {})
        torch.testing.assert_close(emulated(forward, lowering, *given), modified, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(emulated(backward, lowering, *given, grad) * (modified > -math.inf), expected)
        lowered.append(strategy.name)
    assert lowered
    assert lowering.bias == 0
    assert ("native" in lowered) == (score is ir.SCORE and mask is not NO_KEY and not guard)
