"""Contenders are measured on the GPU: times decide, are kept for other processes, and are inherited by nothing else."""

import contextlib

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import cache_info, collect
from cudnn_flex_compile.bench.mods import causal, softcap
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.passes.decide import cost_inputs, device_times, measured_times
from cudnn_flex_compile.reasons import Code
from tests.gpu.test_behaviour import blocks_of_another_diagonal
from tests.support import dense

LENGTH = 2048
PATIENCE = 120  # seconds for a measurement, however busy the machine is


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDNN_FLEX_CACHE", "1")
    monkeypatch.setenv("CUDNN_FLEX_CACHE_DIR", str(tmp_path))
    forget()
    yield
    forget()


def forget():
    """All but what is in the folder."""
    torch._dynamo.reset()
    engine.reset()


def run(length, score_mod, mask_mod, tune_seconds=PATIENCE, **options):
    """The report, once the result was compared."""
    torch.manual_seed(0)
    qkv = [torch.randn(2, length, 4, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
    qkv = [t.requires_grad_() for t in qkv]
    mask = create_block_mask(mask_mod, None, None, length, length, device="cuda") if mask_mod else None
    function = torch.compile(
        lambda q, k, v: flex_attention(q, k, v, score_mod, mask), backend="cudnn_flex",
        options={"tune_seconds": tune_seconds, **options},
    )  # fmt: skip
    with collect() as report:
        out = function(*qkv)
    grad = torch.randn_like(out)
    found = (out.detach(), None, *torch.autograd.grad(out, qkv, grad))
    exact, stock = (dense.with_gradients(*qkv, score_mod, mask_mod, 0.125, grad, exact=e) for e in (True, False))
    for f, e, s in zip(found, exact, stock, strict=True):
        assert f is None or (f - e).norm() <= 2 * (s - e).norm() + 1e-6
    return report


def timed(seconds):
    """In place of the process: what Inductor's kernel takes."""

    @contextlib.contextmanager
    def compiling(contest):
        yield lambda patience: seconds

    return compiling


def fail(contest):
    pytest.fail("measured again")


def check_that_times_decide(report):
    (call,) = report.calls
    print(call.contenders, report.seconds)
    assert {c.measured for c in call.contenders} == {True}, call.reason
    assert {c.name for c in call.contenders} >= {"inductor", "graphs"}
    assert all(c.milliseconds > 0 for c in call.contenders)
    assert [c.won for c in call.contenders] == [True] + [False] * (len(call.contenders) - 1)
    assert (call.reason is None) == (call.contenders[0].name != "inductor")


@pytest.mark.parametrize("score_mod", [softcap(20.0), None], ids=["soft cap", "plain, by lists, too"])
def test_all_contenders_are_measured_once(monkeypatch, score_mod):
    report = run(LENGTH, score_mod, causal, autotune=True)
    check_that_times_decide(report)
    assert cache_info().builds > 0
    forget()
    monkeypatch.setattr(measured_times, "compiling", fail)
    again = run(LENGTH, score_mod, causal, autotune=True)
    assert [c.contenders for c in again.calls] == [c.contenders for c in report.calls]
    assert [c.strategies for c in again.calls] == [c.strategies for c in report.calls]


def test_a_device_without_a_table_is_measured_by_default(monkeypatch):
    known = device_times.times_of(torch.device("cuda"))
    foreign = device_times.DeviceTimes("NVIDIA H200", known.cells, foreign=True)
    monkeypatch.setattr(cost_inputs, "times_of", lambda device: foreign)
    check_that_times_decide(run(2 * LENGTH, None, causal))


def test_what_is_slower_is_kept(monkeypatch):
    monkeypatch.setattr(measured_times, "compiling", timed((1e-6, 1e-6)))
    (call,) = run(LENGTH, None, causal, autotune=True).calls
    assert call.reason.code is Code.SLOWER
    assert call.reason.detail.endswith("measured here")


def test_always_measures_nothing(monkeypatch):
    monkeypatch.setattr(measured_times, "compiling", fail)
    assert run(256, None, causal, lower="always", autotune=True).lowered


def test_what_is_plain_is_not_measured(monkeypatch):
    monkeypatch.setattr(measured_times, "compiling", fail)
    assert run(2 * LENGTH, softcap(20.0), causal).lowered


def test_where_inductor_cannot_be_timed_predictions_decide(monkeypatch):
    def fails(contest):
        raise RuntimeError("no process")

    monkeypatch.setattr(measured_times, "compiling", fails)
    assert run(LENGTH, softcap(20.0), causal, autotune=True).lowered
    forget()
    assert run(LENGTH, None, blocks_of_another_diagonal, autotune=True).kept
