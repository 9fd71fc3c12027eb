"""A gradient of the log-sum-exp: what graphs add for it, and that certification rejects plans that add another.

Knows nothing of cuDNN: graphs are computed by tests/support/emulator.py, plans are stand-ins on the CPU.
"""

import math
from dataclasses import replace

import pytest
import torch

from cudnn_flex_compile.engine.certify.certify import certify
from cudnn_flex_compile.engine.certify.reference import ProgramReference
from cudnn_flex_compile.engine.graph.strategies import STRATEGIES
from cudnn_flex_compile.engine.graph.strategies.native import NAME as NATIVE
from cudnn_flex_compile.engine.guards import ends, guarded
from cudnn_flex_compile.engine.plans import widened_values as wide_module
from cudnn_flex_compile.engine.plans.folded_output import TINY, FoldedPlan, clear, fold
from cudnn_flex_compile.engine.plans.lse_rows import rows_of
from cudnn_flex_compile.engine.plans.widened_values import WidenedPlan
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, TensorSpec
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import environment, evaluate
from cudnn_flex_compile.scoremod.ir import F32, I32, SCORE
from cudnn_flex_compile.scoremod.masks.form import hides
from cudnn_flex_compile.scoremod.masks.linear import KV, Q
from cudnn_flex_compile.scoremod.optable import make
from tests.support.emulator import emulated
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


def spec(*shape, dtype=torch.float32):
    return TensorSpec.of(torch.empty(shape, dtype=dtype))


OF_PAIRS, OF_COLUMNS, OF_ROWS = (HEADS, ROWS, COLUMNS), (BATCH, 1, 1, COLUMNS), (BATCH, 1, ROWS, 1)
PROGRAMS = {
    "plain": (ir.program(), None),
    "causal": (ir.program(mask=CAUSAL), None),
    "soft cap": (ir.program(CAPPED), None),
    "soft cap, window": (ir.program(CAPPED, all_of(CAUSAL, make("ge", number(9), Q - KV))), None),
    "rows without a key": (ir.program(CAPPED, make("ge", KV - Q, number(40))), None),
    "any predicate": (ir.program(CAPPED, make("ne", make("mod", Q + KV, number(3)), number(0))), None),
    "a bias of pairs": (ir.program(SCORE + ir.operand(0, F32, "hqk"), CAUSAL), spec(1, *OF_PAIRS)),
    "hidden columns": (ir.program(CAPPED, hides(ir.operand(0, F32, "bk"))), spec(*OF_COLUMNS, dtype=torch.bfloat16)),
    "limits of rows": (ir.program(mask=make("gt", ir.operand(0, I32, "bq"), KV)), spec(*OF_ROWS, dtype=torch.int32)),
    "squared": (ir.program(SCORE * SCORE * 0.125, CAUSAL), None),
}  # fmt: skip


def drawn(name):
    """The program's operand: what hides columns hides some, all of one batch entry's; limits show none to all."""
    of = PROGRAMS[name][1]
    if of is None:
        return {}
    if of.dtype == torch.int32:
        return {0: torch.arange(2 * ROWS, dtype=torch.int32).view(of.shape) % (COLUMNS + 1)}
    values = torch.randn(of.shape, generator=NUMBERS)
    if of.dtype == torch.bfloat16:
        values = torch.where((values > 0) & (torch.arange(BATCH).view(-1, 1, 1, 1) == 0), 0.0, -math.inf)
    return {0: values.to(of.dtype)}


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


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_graphs_compute_the_formula(name, guard):
    """dS from P * (dP - delta), as cuDNN gives it, is the gradient of sum(dO * O) + sum(dLSE * LSE) by autograd."""
    program, of = PROGRAMS[name]
    operands = drawn(name)
    raw = (torch.randn(BATCH, HEADS, ROWS, COLUMNS, generator=NUMBERS, dtype=torch.float64) * 2).requires_grad_()
    value, grad = (torch.randn(BATCH, HEADS, n, 8, generator=NUMBERS).double() for n in (COLUMNS, ROWS))
    grad_lse = torch.randn(BATCH, HEADS, ROWS, 1, generator=NUMBERS)
    modified, lse = attention(raw, program, operands)
    seen = lse > -math.inf
    weights = torch.exp(torch.where(modified > -math.inf, modified - torch.where(seen, lse, 0.0), -math.inf))
    loss = ((weights @ value) * grad).sum() + (torch.where(seen, lse, 0.0) * grad_lse).sum()
    expected = torch.autograd.grad(loss, raw)[0].nan_to_num()
    of_out = weights * (grad @ value.mT - (grad * (weights @ value)).sum(-1, keepdim=True))
    asked = problem(program, BACKWARD, () if of is None else (of,), (ROWS, COLUMNS))
    asked = replace(asked, lse_gradient=True)
    rows = dict(zip(ir.ROWS, rows_of(lse.detach().float(), grad_lse), strict=True))
    lowered = []
    for strategy in STRATEGIES:
        variant = guarded(program, asked.lengths) if guard else program
        lowering = strategy.lower(variant, True, ends(asked.lengths))
        if isinstance(lowering, Reason):
            continue
        found = emulated(asked, lowering, raw.detach(), operands, {}, {}, of_out.detach(), rows)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        lowered.append(strategy.name)
    assert lowered
    assert NATIVE not in lowered


def test_rows_that_see_nothing_are_no_infinities():
    stats = torch.tensor([[[1.5, -math.inf, -2.0, math.nan]]])
    minus_lse, grad_lse = rows_of(stats, torch.ones(()).expand(1, 1, 4))
    assert minus_lse.nan_to_num(9.0).tolist() == [[[-1.5, 0.0, 2.0, 9.0]]]
    assert grad_lse.is_contiguous()
    assert stats.nan_to_num(9.0, neginf=-8.0).tolist() == [[[1.5, -8.0, -2.0, 9.0]]], "the given ones stay as they are"
    assert rows_of(stats, None) == ()


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


def wide(inner):
    return around(WidenedPlan, inner)


@pytest.mark.parametrize("stand_in", [StandIn, FlashStandIn, wide(StandIn), wide(FlashStandIn)])
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
            super().run((*tensors[:7], tensors[7] * factor, *tensors[8:]), *rest)

    assert "off by" in verdict(around(Wrong, FlashStandIn), CERTIFIED[name]).detail


@pytest.mark.parametrize("name", CERTIFIED)
def test_rows_without_another_gradient_are_looked_at(name):
    """Without the tiny entry their gradient of the log-sum-exp is lost."""

    class Lost(FoldedPlan):
        def run(self, tensors, *rest):
            alone = (tensors[5] == 0).all(-1, keepdim=True)
            super().run((*tensors[:7], tensors[7].masked_fill(alone, 0.0), *tensors[8:]), *rest)

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
    rows = rows_of(stats, torch.randn(stats.shape, generator=NUMBERS))

    def found(runs, grad, *more):
        gradients = [torch.full(s.shape, math.nan).to(s.dtype) for s in plan.outputs]
        runs.run((query, key, value, out, stats, grad, *more, *gradients), [], [], [])
        return gradients

    dq, dk, dv = found(plan, torch.zeros_like(grad), *rows)
    assert torch.equal(dv, torch.zeros_like(dv))
    assert dq.any()
    assert dk.any()
    grad[:, :, ROWS // 2 :] = 0.0
    assert torch.equal(found(plan, grad, *rows)[2], found(plan.inner, grad)[2])


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
    "left out": lambda minus_lse, grad_lse: torch.zeros_like(grad_lse),
    "with another sign": lambda minus_lse, grad_lse: -grad_lse,
    "of a base-2 log-sum-exp": lambda minus_lse, grad_lse: grad_lse / math.log(2),
    "of another row": lambda minus_lse, grad_lse: grad_lse.roll(1, 2),
    "of another head": lambda minus_lse, grad_lse: grad_lse.roll(1, 1),
    "one for a batch": lambda minus_lse, grad_lse: grad_lse[:1].expand(grad_lse.shape),
    "left out in some rows": lambda minus_lse, grad_lse: grad_lse * (torch.arange(70).view(-1, 1) // 16 != 2),
    "slightly off": lambda minus_lse, grad_lse: grad_lse * 1.1,
    "twice the weight": lambda minus_lse, grad_lse: grad_lse * torch.exp(minus_lse.sign()),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CERTIFIED)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_gradients_of_the_log_sum_exp_are_caught(wrong, name, dtype):
    class Wrong(StandIn):
        def grad_lse(self, minus_lse, grad_lse):
            return WRONG[wrong](minus_lse, grad_lse).squeeze(-1)

    assert "off by" in verdict(Wrong, CERTIFIED[name], dtype=dtype).detail


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CERTIFIED)
@pytest.mark.parametrize("ones", [(), (1024.0,), (1.0, 1024.0, 1.0)])
def test_wider_values_are_certified_as_a_whole(ones, name, dtype, monkeypatch):
    """Without a column of ones, with one that is another, or with too few parts of float16's range."""
    monkeypatch.setattr(wide_module, "ONES", ones)
    found = verdict(wide(StandIn), CERTIFIED[name], dtype=dtype)
    assert found is None if ones else "off by" in found.detail


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 3e5])
def test_wider_values_hold_the_gradient_exactly(size, dtype):
    """To 2**-20 of it, or half of float16's smallest step; and beyond float16's range."""
    seen = []

    class Reading(StandIn):
        def run(self, tensors, *rest):
            seen.append((tensors[5].float() * tensors[2][:1, :1, :1].float())[..., 16:].sum(-1, keepdim=True))
            super().run(tensors, *rest)

    asked = replace(problem(ir.program(), BACKWARD, dtype=dtype), lse_gradient=True)
    plan = wide(Reading)(asked)
    tensors = [torch.randn(s.shape, generator=NUMBERS).to(s.dtype) for s in (
        asked.query, asked.key, asked.value, asked.out)]  # fmt: skip
    stats, grad_lse = torch.zeros(2, 4, 70, 1), torch.randn(2, 4, 70, 1, generator=NUMBERS) * size
    gradients = [torch.empty(s.shape, dtype=s.dtype) for s in plan.outputs]
    plan.run((*tensors, stats, tensors[3], stats, grad_lse, *gradients), [], [], [])
    assert (seen[0] - grad_lse).abs().max() <= max(2**-20 * size, 2**-25)


def test_a_plan_is_given_the_rows_amid_nans():
    """What its last tiles read beyond them; and rows that see nothing as 0."""
    program, seen = CERTIFIED["rows without a key"], []

    class Reading(StandIn):
        def grad_lse(self, minus_lse, grad_lse):
            for tensor in (minus_lse, grad_lse):
                assert tensor.shape == (2, 4, 70, 1)
                assert tensor.is_contiguous()
                memory = torch.empty(0).set_(tensor.untyped_storage())
                first = tensor.storage_offset()
                assert memory[first - 128 : first].isnan().all()
                assert memory[first + tensor.numel() :][:128].isnan().all()
            seen.append((minus_lse == 0).any())
            return super().grad_lse(minus_lse, grad_lse)

    assert verdict(Reading, program) is None
    assert all(seen)


def test_a_plain_backward_is_given_none():
    class Plain(StandIn):
        def grad_lse(self, minus_lse, grad_lse):
            raise AssertionError("a gradient that the problem has not")

    forward = StandIn(problem(CERTIFIED["plain"], FORWARD))
    assert certify(Plain(problem(CERTIFIED["plain"], BACKWARD)), forward, ProgramReference(CERTIFIED["plain"])) is None
