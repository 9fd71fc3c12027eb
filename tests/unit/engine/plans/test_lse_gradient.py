"""A gradient of the log-sum-exp: the output holds it, and certification rejects plans that add another.

Knows nothing of cuDNN: plans are stand-ins on the CPU.
"""

import math
from dataclasses import replace

import pytest
import torch

from cudnn_flex_compile.engine.certify.certify import certify
from cudnn_flex_compile.engine.certify.reference import ProgramReference
from cudnn_flex_compile.engine.plans.folded_output import TINY, FoldedPlan, clear, fold
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import environment, evaluate
from cudnn_flex_compile.scoremod.ir import I32, SCORE
from cudnn_flex_compile.scoremod.masks.linear import KV, Q
from cudnn_flex_compile.scoremod.optable import make
from tests.support.flash import FlashStandIn
from tests.unit.engine.certify.test_certify import StandIn, problem

pytestmark = pytest.mark.any_torch
BATCH, HEADS, ROWS, COLUMNS = 2, 4, 70, 90
CAUSAL = make("ge", Q, KV)
CAPPED = make("tanh", SCORE / 20.0) * 20.0
NUMBERS = torch.Generator().manual_seed(5)


def number(value):
    return ir.const(value, I32)


def all_of(*predicates):
    found = ir.TRUE
    for predicate in predicates:
        found = make("and", found, predicate)
    return found


def attention(raw, program, operands):
    """Modified, masked scores of raw ones, in their dtype, and the natural log-sum-exp of each row."""
    where = [
        torch.arange(n, dtype=torch.int32).view([-1 if i == d else 1 for i in range(4)])
        for d, n in enumerate(raw.shape)
    ]
    leaf = environment(raw, dict(zip("bhqk", where, strict=True)), operands, {}, {})
    score, visible = (evaluate(root, leaf, high=True) for root in (program.score, program.mask))
    modified = torch.where(visible, score, -math.inf).expand(raw.shape)
    return modified, modified.logsumexp(-1, keepdim=True)


CERTIFIED = {
    "plain": ir.program(),
    "soft cap, causal": ir.program(CAPPED, CAUSAL),
    "rows without a key": ir.program(SCORE, make("ge", KV - Q, number(40))),
}


def verdict(stand_in, program, **how):
    asked = replace(problem(program, BACKWARD, **how), lse_gradient=True)
    forward = StandIn(problem(program, FORWARD, **how))
    return certify(stand_in(asked), forward, ProgramReference(program))


def around(way, inner):
    """A plan around one that knows no gradient of the log-sum-exp."""
    return lambda asked: way(asked, inner(way.inner_problem(asked)))


@pytest.mark.parametrize("stand_in", [StandIn, FlashStandIn])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CERTIFIED)
def test_right_plans_pass(name, dtype, stand_in):
    assert verdict(stand_in, CERTIFIED[name], dtype=dtype) is None


@pytest.mark.parametrize("name", CERTIFIED)
def test_an_output_that_holds_the_gradient_passes(name):
    assert verdict(around(FoldedPlan, FlashStandIn), CERTIFIED[name]) is None


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.1, 1 / math.log(2)])
@pytest.mark.parametrize("name", CERTIFIED)
def test_another_gradient_in_the_output_is_caught(name, factor):
    class Wrong(FoldedPlan):
        def run(self, tensors, *rest):
            super().run((*tensors[:6], tensors[6] * factor, *tensors[7:]), *rest)

    assert "off by" in verdict(around(Wrong, FlashStandIn), CERTIFIED[name]).detail


@pytest.mark.parametrize("name", CERTIFIED)
def test_rows_without_another_gradient_are_looked_at(name):
    """Without the tiny entry their gradient of the log-sum-exp is lost."""

    class Lost(FoldedPlan):
        def run(self, tensors, *rest):
            alone = (tensors[5] == 0).all(-1, keepdim=True)
            super().run((*tensors[:6], tensors[6].masked_fill(alone, 0.0), *tensors[7:]), *rest)

    assert "off by" in verdict(around(Lost, FlashStandIn), CERTIFIED[name]).detail


@pytest.mark.parametrize("size", [0.0, 1e-35, 1e-20, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("grad_size", [0.0, 1e-38, 1e-20, 1e-6, 1.0, 1e4])
def test_the_output_holds_the_gradient(size, grad_size):
    """In the product of O' and dO', to 2**-15, or a half of bfloat16's step where dO has one entry; and what else reads
    dO reads the same.
    """
    out, grad = (torch.randn(2, 3, 40, 64, generator=NUMBERS) for _ in range(2))
    out, grad = out.bfloat16(), (grad * grad_size).bfloat16()
    grad[:, :, 7], grad[:, :, 8, 1:] = 0.0, 0.0
    grad_lse = torch.randn(2, 3, 40, generator=NUMBERS) * size
    grad_lse[..., 9] = 0.0
    folded, folded_grad = torch.full_like(out, math.nan), torch.full_like(out, math.nan)
    fold(out, grad, grad_lse, folded, folded_grad)
    exact = (out.double() * grad.double()).sum(-1) - grad_lse.double()
    parts = folded.double() * folded_grad.double()
    steps = torch.where(torch.arange(40) == 8, 2.0**-8, 2.0**-15)
    assert ((parts.sum(-1) - exact).abs() <= steps * parts.abs().sum(-1) + 8 * TINY).all()
    assert torch.equal(folded[:, :, 9], out[:, :, 9])
    assert (folded_grad.double() - grad.double()).abs().max() <= 1.01 * TINY
    changed = (folded_grad != grad).any(-1)
    assert bool((~changed | (grad.abs().amax(-1) < TINY)).all())


@pytest.mark.parametrize("stand_in", [StandIn, FlashStandIn])
@pytest.mark.parametrize("name", CERTIFIED)
def test_of_the_log_sum_exp_alone_no_gradient_reaches_the_values(name, stand_in):
    """Nor of some rows of it alone: there dV is what it is without a gradient of the log-sum-exp."""
    program = CERTIFIED[name]
    asked = replace(problem(program, BACKWARD), lse_gradient=True)
    plan = around(FoldedPlan, stand_in)(asked)
    query, key, value, grad = (
        torch.randn(s.shape, generator=NUMBERS).to(s.dtype) for s in (asked.query, asked.key, asked.value, asked.out)
    )
    out, stats = torch.empty_like(grad), torch.empty(*grad.shape[:3], 1)
    stand_in(problem(program, FORWARD)).run((query, key, value, out, stats), [], [], [])
    grad_lse = torch.randn(stats.shape, generator=NUMBERS)

    def found(runs, grad, *more):
        gradients = [torch.full(s.shape, math.nan).to(s.dtype) for s in plan.outputs]
        runs.run((query, key, value, out, stats, grad, *more, *gradients), [], [], [])
        return gradients

    dq, dk, dv = found(plan, torch.zeros_like(grad), grad_lse)
    assert torch.equal(dv, torch.zeros_like(dv))
    assert dq.any()
    assert dk.any()
    grad[:, :, ROWS // 2 :] = 0.0
    assert torch.equal(found(plan, grad, grad_lse)[2], found(plan.inner, grad)[2])


def test_what_tiny_entries_leave_is_zero_and_all_else_stays():
    for rows in (1, 70, 2**20):
        left = 1.9 * rows * TINY
        given = torch.tensor([left, -left, 0.0, 4 * rows * TINY, -1.0, math.nan, math.inf]).bfloat16()
        found = given.repeat(2, 1)[:, None, :, None].repeat(1, 1, 1, 4)
        clear(found, rows)
        assert torch.equal(found[..., 2:].nan_to_num(), given.view(-1, 1).expand(2, 1, 7, 2).nan_to_num())
        expected = torch.where(torch.arange(7) < 2, 0.0, given)
        assert torch.equal(found[1, 0, :, :2].nan_to_num(7.0), expected[:, None].expand(7, 2).nan_to_num(7.0))


WRONG = {
    "left out": lambda grad_lse: torch.zeros_like(grad_lse),
    "with another sign": lambda grad_lse: -grad_lse,
    "of a base-2 log-sum-exp": lambda grad_lse: grad_lse / math.log(2),
    "of another row": lambda grad_lse: grad_lse.roll(1, 2),
    "of another head": lambda grad_lse: grad_lse.roll(1, 1),
    "one for a batch": lambda grad_lse: grad_lse[:1].expand(grad_lse.shape),
    "left out in some rows": lambda grad_lse: grad_lse * (torch.arange(70).view(-1, 1) // 16 != 2),
    "slightly off": lambda grad_lse: grad_lse * 1.1,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CERTIFIED)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_gradients_of_the_log_sum_exp_are_caught(wrong, name, dtype):
    class Wrong(StandIn):
        def grad_lse(self, grad_lse):
            return WRONG[wrong](grad_lse).squeeze(-1)

    assert "off by" in verdict(Wrong, CERTIFIED[name], dtype=dtype).detail


def test_a_plan_is_given_the_rows_amid_nans():
    """What its last tiles read beyond them."""
    class Reading(StandIn):
        def grad_lse(self, grad_lse):
            assert grad_lse.shape == (2, 4, 70, 1)
            assert grad_lse.is_contiguous()
            memory, first = torch.empty(0).set_(grad_lse.untyped_storage()), grad_lse.storage_offset()
            assert memory[first - 128 : first].isnan().all()
            assert memory[first + grad_lse.numel() :][:128].isnan().all()
            return super().grad_lse(grad_lse)

    assert verdict(Reading, CERTIFIED["rows without a key"]) is None


def test_a_plain_backward_is_given_none():
    class Plain(StandIn):
        def grad_lse(self, grad_lse):
            raise AssertionError("a gradient that the problem has not")

    forward = StandIn(problem(CERTIFIED["plain"], FORWARD))
    assert certify(Plain(problem(CERTIFIED["plain"], BACKWARD)), forward, ProgramReference(CERTIFIED["plain"])) is None
