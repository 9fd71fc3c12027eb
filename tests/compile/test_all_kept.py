"""A graph whose calls are all kept for one reason: one warning, once for each reason, that says what to do.

Knows nothing of how a reason is found.
"""

import logging

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from cudnn_flex_compile import collect, explain
from cudnn_flex_compile.passes import contenders
from cudnn_flex_compile.passes.decide import eligibility
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.report import all_kept

OPTIONS = {"inner_backend": "eager"}


def unknown(score, b, h, q, kv):
    return torch.special.i0(score)


def layers(x, score_mods=(None,) * 3):
    for score_mod in score_mods:
        x = flex_attention(x, x, x, score_mod=score_mod)
    return x


@pytest.fixture
def warned(monkeypatch, caplog):
    """The warnings of graphs compiled in a fresh process, as text."""
    monkeypatch.setattr(all_kept, "_warned", set())
    torch._dynamo.reset()

    def texts(score_mods=(None,) * 3, dtype=torch.float32, length=64, **options):
        caplog.clear()
        x = torch.randn(1, 2, length, 32, dtype=dtype)
        with caplog.at_level(logging.WARNING, "cudnn_flex_compile"), torch.no_grad():
            compiled = torch.compile(layers, backend="cudnn_flex", dynamic=False, options={**OPTIONS, **options})
            compiled(x, score_mods)
        return [r.getMessage() for r in caplog.records if r.name == "cudnn_flex_compile"]

    return texts


def test_a_float32_model_is_told_once_what_to_do(warned):
    (text,) = warned()
    parts = "3 of 3", "DTYPE", "torch.float32", "torch.autocast", "model.to(torch.bfloat16)", "docs/limits.md#dtype"
    assert [part for part in parts if part not in text] == []
    assert warned(length=96) == []


def test_each_reason_is_told_of(warned):
    assert [Code.DTYPE.name in text for text in warned()] == [True]
    assert [Code.UNKNOWN_OP.name in text for text in warned((unknown, unknown), torch.bfloat16)] == [True]
    assert warned((unknown,) * 3, torch.bfloat16) == []


def test_one_lowered_call_is_enough(warned):
    assert warned((None, unknown), torch.bfloat16) == []
    assert warned((None,), torch.bfloat16) == []


def test_two_reasons_are_not_one(warned):
    assert warned((None, unknown)) == []


@pytest.mark.parametrize("code", sorted(all_kept.QUIET, key=lambda c: c.name), ids=lambda c: c.name)
def test_nobody_is_warned_where_nothing_need_be_changed(warned, monkeypatch, code):
    monkeypatch.setattr(contenders, "plan_or_reason", lambda candidate: Reason(code, "made up"))
    assert warned(dtype=torch.bfloat16) == []


def test_whoever_collects_is_not_warned(warned, caplog):
    with collect() as report:
        assert warned() == []
    assert [call.reason.code for call in report.calls] == [Code.DTYPE] * 3
    with caplog.at_level(logging.WARNING, "cudnn_flex_compile"):
        explain(layers, torch.randn(1, 2, 80, 32), options=OPTIONS)
    assert "DTYPE" not in caplog.text
    assert len(warned(length=96)) == 1


def test_the_dtype_comes_before_the_speed(warned, monkeypatch):
    monkeypatch.setattr(eligibility, "unplannable", lambda *_: Reason(Code.SLOWER, "made up"))
    (text,) = warned(lower="when_faster")
    assert "DTYPE: queries, keys and values are torch.float32" in text


def test_dtypes_that_differ_are_named_in_their_order():
    x = torch.randn(1, 2, 64, 32, dtype=torch.bfloat16)
    report = explain(lambda q, k: flex_attention(q, k, k), x, x.float(), options=OPTIONS)
    (call,) = report.calls
    assert str(call.reason) == "DTYPE: queries are torch.bfloat16, keys torch.float32, values torch.float32"
