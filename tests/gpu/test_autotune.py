"""options={"autotune": True} on the GPU: what was measured decides, is kept, and is inherited by nothing else."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import cache_info, collect
from cudnn_flex_compile.bench.mods import MASKS, causal, softcap
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.passes.decide import autotune
from cudnn_flex_compile.reasons import Code
from tests.support import dense

LENGTH = 2048


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


def run(length, score_mod, mask_mod, **options):
    """The report, once the result was compared."""
    torch.manual_seed(0)
    qkv = [torch.randn(2, length, 4, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
    qkv = [t.requires_grad_() for t in qkv]
    mask = create_block_mask(mask_mod, None, None, length, length, device="cuda") if mask_mod else None
    function = torch.compile(
        lambda q, k, v: flex_attention(q, k, v, score_mod, mask), backend="cudnn_flex",
        options={"autotune": True, **options},
    )  # fmt: skip
    with collect() as report:
        out = function(*qkv)
    grad = torch.randn_like(out)
    found = (out.detach(), None, *torch.autograd.grad(out, qkv, grad))
    exact, stock = (dense.with_gradients(*qkv, score_mod, mask_mod, 0.125, grad, exact=e) for e in (True, False))
    for f, e, s in zip(found, exact, stock, strict=True):
        assert f is None or (f - e).norm() <= 2 * (s - e).norm() + 1e-6
    return report


def test_what_is_faster_is_lowered_and_the_times_are_kept(monkeypatch):
    report = run(LENGTH, softcap(20.0), causal)
    (times,) = engine.times._entries.values()
    print(times, report.seconds)
    assert min(*times.ours, *times.stock) > 0
    assert bool(report.lowered) == (times.reason is None)
    built = cache_info().builds
    assert built > 0
    forget()
    monkeypatch.setattr(autotune, "milliseconds", lambda contest: pytest.fail("measured again"))
    again = run(LENGTH, softcap(20.0), causal)
    assert [c.strategies for c in again.calls] == [c.strategies for c in report.calls]
    assert cache_info().builds == 0


def test_what_is_slower_is_kept(monkeypatch):
    monkeypatch.setattr(autotune, "milliseconds", lambda contest: (1e-6, 1e-6))
    (call,) = run(LENGTH, None, causal).calls
    assert call.reason.code is Code.SLOWER
    assert "measured here" in call.reason.detail


def test_always_times_the_strategies_alone(monkeypatch):
    monkeypatch.setattr(autotune, "milliseconds", lambda contest: pytest.fail("nothing to compare with"))
    assert run(256, None, causal, lower="always").lowered


def test_where_inductor_cannot_be_timed_the_rules_decide(monkeypatch):
    monkeypatch.setattr(autotune, "milliseconds", lambda contest: None)
    assert run(LENGTH, softcap(20.0), causal).lowered
    forget()
    assert run(LENGTH, *MASKS["dilated window"](4, LENGTH, "cuda")).kept
