"""Losses that the log-sum-exp takes part in, through torch.compile on the CPU, against dense attention and autograd."""

import warnings

import pytest
import torch
from torch.nn.attention import flex_attention as stock
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from cudnn_flex_compile.bench.mods import causal, sliding, softcap
from cudnn_flex_compile.engine import find_plan
from cudnn_flex_compile.engine.problem import BACKWARD
from cudnn_flex_compile.engine.store.plan_cache import CachedPlan
from cudnn_flex_compile.passes import contenders
from cudnn_flex_compile.passes.decide import candidate
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.report.report import collect
from tests.support import dense

HEADS, LENGTH, DIM = 4, 160, 16
MODS = {
    "full": (None, None), "causal": (None, causal), "sliding": (None, sliding(40)), "soft cap": (softcap(5.0), causal),
    "rows without a key": (softcap(5.0), lambda b, h, q, kv: q >= kv + 40),
}  # fmt: skip
REQUESTS = {"return_lse": {"return_lse": True}, "aux": {"return_aux": AuxRequest(lse=True)}}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """flex_attention refuses to train on the CPU, whatever its backend is."""
    monkeypatch.setattr(stock, "_validate_device", lambda query, key, value: None)
    torch._dynamo.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def inputs(kv_heads=HEADS):
    shapes = [(2, LENGTH, heads, DIM) for heads in (HEADS, kv_heads, kv_heads)]
    return [torch.randn(shape).transpose(1, 2).bfloat16().requires_grad_() for shape in shapes]


def sink(out, lse, sinks):
    """As gpt-oss has it: a further key, whose score is learnt and whose value is zero."""
    return out * torch.sigmoid(lse - sinks.view(-1, 1)).unsqueeze(-1).to(out.dtype)


def attention(name, request, kv_heads=HEADS):
    score_mod, mask_mod = MODS[name]
    mask = create_block_mask(mask_mod, None, None, LENGTH, LENGTH, device="cpu") if mask_mod else None

    def attend(q, k, v):
        out, lse = flex_attention(q, k, v, score_mod, mask, enable_gqa=kv_heads != HEADS, **request)
        return out, getattr(lse, "lse", lse)

    return attend


def compiled(function, inner="aot_eager"):
    options = {"inner_backend": inner, "lower": "always"}
    return torch.compile(function, backend="cudnn_flex", options=options)


def of_dense(name, loss, leaves, exact):
    """The gradients of a loss of out and lse, whose rows without a key have a log-sum-exp of -inf."""
    copies = [dense.leaf(t, exact) for t in leaves]
    out, lse = dense.attention(*copies[:3], *MODS[name], DIM**-0.5, exact)
    found = torch.autograd.grad(loss(out, lse, *copies[3:]), copies, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g.nan_to_num() for g, t in zip(found, copies, strict=True)]


def assert_right(found, name, loss, leaves):
    exact, stock = (of_dense(name, loss, leaves, exact) for exact in (True, False))
    for f, e, s in zip(found, exact, stock, strict=True):
        assert f.isfinite().all()
        assert (f.double() - e).norm() <= 2 * (s.double() - e).norm() + 1e-12


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("name", MODS)
def test_attention_sinks(name, request_, kv_heads):
    attend, leaves = attention(name, REQUESTS[request_], kv_heads), [*inputs(kv_heads), torch.randn(HEADS)]
    leaves[3].requires_grad_()
    weight = torch.randn(2, HEADS, LENGTH, DIM)

    def loss(out, lse, sinks):
        return (sink(out, lse, sinks) * weight.to(out.dtype)).sum()

    with collect() as report:
        result = compiled(lambda q, k, v, sinks: sink(*attend(q, k, v), sinks))(*leaves)
    assert [str(call.reason) for call in report.kept] == []
    assert report.lowered[0].strategies == ("chained" if MODS[name][0] else "native",)
    found = torch.autograd.grad((result * weight.to(result.dtype)).sum(), leaves)
    assert_right(found, name, loss, leaves)


LOSSES = {
    "of the log-sum-exp alone": lambda out, lse: lse.sin().sum(),
    "of the output alone": lambda out, lse: (out.double() ** 2).sum(),
    "of both": lambda out, lse: (lse.cos().unsqueeze(-1) * out).sum(),
}


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_says_at_each_step_what_takes_part(loss, inner):
    """One compiled function gives out and lse; the loss is outside of it."""
    leaves = inputs()
    call = compiled(attention("soft cap", {"return_lse": True}), inner)
    for which in (loss, "of both", loss):
        found = torch.autograd.grad(LOSSES[which](*call(*leaves)), leaves, allow_unused=True)
        found = [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]
        assert_right(found, "soft cap", LOSSES[which], leaves)


def test_plans_of_both_backwards_are_wanted(monkeypatch):
    """On a GPU, where the log-sum-exp is used in training; one that no plan is right for keeps the call."""
    asked, refused = [], []

    def found(key, reference, fingerprint):
        problem = candidate.problem_of(key)
        asked.append((problem.direction, problem.lse_gradient))
        if problem.lse_gradient and refused:
            return Reason(Code.SHAPE_REFUSED, "too many row vectors", lasting=False)
        return CachedPlan(type("P", (), {"strategy": "s", "problem": problem, "errors": ()})(), (False,) * 4)

    def judge(wanted):
        device = torch.device("cpu")
        key = candidate.forward_call(wanted, wanted.running, device)
        problem = candidate.problem_of(key)
        return candidate._certified(wanted, key, problem)

    monkeypatch.setattr(find_plan, "find_plan", found)
    monkeypatch.setattr(contenders, "plan_or_reason", judge)
    attend = attention("causal", {"return_lse": True})

    def reports(function, grad=True):
        torch._dynamo.reset()
        asked.clear()
        with collect() as report, torch.set_grad_enabled(grad):
            compiled(function)(*inputs())
        return report.calls[0]

    assert reports(attend).strategies == ("s", "s")
    assert asked[1:] == [(BACKWARD, False), (BACKWARD, True)]
    reports(lambda q, k, v: attend(q, k, v)[0])
    assert asked[1:] == [(BACKWARD, False)], "it reaches nothing"
    reports(lambda q, k, v: [t.detach() if t.dim() == 3 else t for t in attend(q, k, v)])
    assert asked[1:] == [(BACKWARD, False)], "it is detached"
    reports(lambda q, k, v: (lambda out, lse: out * (lse.detach() * 2).exp().unsqueeze(-1))(*attend(q, k, v)))
    assert asked[1:] == [(BACKWARD, False)], "it is a number"
    reports(lambda q, k, v: (lambda out, lse: (out, lse.detach() + 1, lse * 2))(*attend(q, k, v)))
    assert asked[1:] == [(BACKWARD, False), (BACKWARD, True)], "another use of it is not detached"
    reports(attend, grad=False)
    assert asked[1:] == []
    refused.append(True)
    kept = reports(attend).reason
    assert kept.code is Code.LSE_GRADIENT
    assert "too many row vectors" in kept.detail
    assert not kept.lasting


def test_such_a_call_is_kept_in_float16():
    attend, leaves = attention("causal", REQUESTS["return_lse"], 4), inputs(4)
    leaves = [leaf.detach().half().requires_grad_() for leaf in leaves]
    with collect() as report:
        torch.compile(
            lambda *t: sink(*attend(*t), torch.zeros(HEADS)),
            backend="cudnn_flex",
            options={"inner_backend": "aot_eager", "lower": "always"},
        )(*leaves)
    assert [call.reason.code for call in report.kept] == [Code.LSE_GRADIENT]
    assert "another dtype than bfloat16" in report.kept[0].reason.detail
    with torch.no_grad(), collect() as report:
        torch._dynamo.reset()
        torch.compile(lambda *t: attend(*t), backend="cudnn_flex", options={"inner_backend": "aot_eager"})(*leaves)
    assert report.kept == []
