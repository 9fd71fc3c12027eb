"""No spelling of a call is a bug of ours: each is lowered, or kept with a reason, and no traceback is logged.

What stock flex_attention refuses raises stock's error, whatever that is. INTERNAL is for our bugs alone.
"""

import functools
import logging
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import cudnn_flex_compile
from cudnn_flex_compile.reasons import Code
from tests.support.spellings import SPELLINGS, inputs

OPTIONS = {"inner_backend": "aot_eager", "lower": "always"}


@functools.cache
def report_of(name):
    """The report of a spelling's call, the error that it raises, and the tracebacks that we log."""
    torch._dynamo.reset()
    tracebacks, ours = [], logging.getLogger("cudnn_flex_compile")
    logged = logging.Handler(logging.INFO)
    logged.emit = lambda record: tracebacks.append(record.getMessage()) if record.exc_info else None
    ours.addHandler(logged)
    level = ours.level
    ours.setLevel(logging.INFO)
    try:
        return *_reported(name), tracebacks
    finally:
        ours.setLevel(level)
        ours.removeHandler(logged)


def _reported(name):
    compiled = torch.compile(SPELLINGS[name], backend="cudnn_flex", options=OPTIONS)
    with (
        warnings.catch_warnings(),
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True),
        cudnn_flex_compile.collect() as report,
    ):
        warnings.simplefilter("ignore")
        try:
            compiled(*inputs())
        except Exception as error:  # stock's, or that of Dynamo: the user sees it without us, too
            return report, error
    return report, None


@pytest.mark.parametrize("name", SPELLINGS)
def test_no_spelling_is_a_bug_of_ours(name):
    report, error, tracebacks = report_of(name)
    assert not [c.reason for c in report.calls if c.reason and c.reason.code is Code.INTERNAL]
    assert all(c.reason.detail for c in report.kept)
    assert not tracebacks
    assert error is None or not _is_ours(error)


def _is_ours(error):
    """Whether a file of the package raised it."""
    while error.__cause__ is not None:
        error = error.__cause__
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return raised_in.is_relative_to(Path(cudnn_flex_compile.__file__).parent)


REASONS = {
    "too long": Code.TOO_LARGE, "doubling": Code.TOO_LARGE, "scale tensor": Code.UNSUPPORTED_CALL,
    "scale item": Code.UNSUPPORTED_CALL, "length from data": Code.DATA_DEPENDENT,
    "captured torch.float64": Code.UNKNOWN_OP, "cond": Code.UNKNOWN_OP, "torch.float32": Code.DTYPE,
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_what_is_not_taken_says_so(name):
    report, error, _ = report_of(name)
    assert [c.reason and c.reason.code for c in report.calls] == [REASONS[name]], str(error)


def test_a_forced_kernel_is_named():
    report, *_ = report_of("options {'FORCE_USE_FLEX_ATTENTION': True}")
    assert "FORCE_USE_FLEX_ATTENTION=True" in report.kept[0].reason.detail


def test_a_size_that_depends_on_data_is_named(monkeypatch):
    """In one graph, where the number of tokens is known at run time alone."""
    monkeypatch.setitem(SPELLINGS, "tokens", lambda q, k, v: flex_attention(*[_picked(t) for t in (q, q, q)], causal))
    report, *_ = report_of("tokens")
    assert [c.reason.code for c in report.calls] == [Code.DATA_DEPENDENT]
    assert "depends on data" in report.kept[0].reason.detail


def _picked(tensor):
    tokens = tensor.reshape(-1, 32)
    return tokens[tokens[:, 0] > 0].view(1, -1, 2, 16).transpose(1, 2)


def causal(s, b, h, q, kv):
    return torch.where(q >= kv, s, -float("inf"))


@pytest.mark.parametrize(("name", "kept"), [("a region called twice", 0), ("a kept region called twice", 2)])
def test_each_call_of_a_region_that_is_compiled_once_counts(name, kept):
    report, error, _ = report_of(name)
    assert (len(report.calls), len(report.kept)) == (2, kept), str(error)
