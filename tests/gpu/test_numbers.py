"""Numbers that stand for "none", and indices that hold where a pair is visible, on the GPU: the tests of the CPU."""

import math

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.attention.flex_attention import flex_attention

from cudnn_flex_compile import cache_clear, collect
from cudnn_flex_compile.reasons import Code
from tests.compile import test_numbers, test_unvisited
from tests.compile.test_backend import fresh

__all__ = ["fresh"]

HEAD_DIM = 64
ALWAYS = {"lower": "always"}
PROGRAMS = 12


@pytest.fixture(autouse=True)
def head_dims(monkeypatch):
    """Heads as large as cuDNN has them."""
    cache_clear()
    wide = test_numbers.qkv
    for module in (test_numbers, test_unvisited):
        monkeypatch.setattr(module, "qkv", lambda **how: wide(dim=HEAD_DIM, **how))
    yield
    cache_clear()


def test_a_window_of_any_size():
    def f(q, k, v, window):
        def score_mod(s, b, h, i, j):
            return torch.where((i >= j) & (i - j < window), s, -math.inf)

        return flex_attention(q, k, v, score_mod)

    test_numbers.by_windows(f, "cuda")


def test_generated_programs_of_numbers_of_any_size():
    """Some have numbers that no plan takes, at the first call or later, and run on Inductor's kernel then."""
    reasons = {number: test_numbers.check(number, "cuda") for number in range(PROGRAMS)}
    kept = {number: str(reason) for number, reason in reasons.items() if reason is not None}
    assert len(kept) <= PROGRAMS // 3, kept


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("number", range(3))
def test_paged_indices_that_hold_where_a_pair_is_visible(number, blocks):
    test_unvisited.compare(number, "cuda", blocks)
    torch.cuda.synchronize()


def outcome(function, args, **how):
    """What a compiled function gives, or the error that Inductor raises: its kernels have no finfo(float32).min."""
    torch._dynamo.reset()
    try:
        return torch.compile(function, **how)(*args)
    except BackendCompilerFailed as error:
        return str(error.inner_exception).splitlines()[0]


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("fill", test_numbers.FILLS)
def test_rows_hidden_whole_by_a_finite_number_are_stocks(fill, added):
    """Such a call is kept, so that it is what Inductor makes of it."""
    number = test_numbers.FILLS[fill]

    def hidden(s, b, h, i, j):
        shown = (i >= j) & (i != 5)
        return s + torch.where(shown, 0.0, number) if added else torch.where(shown, s, number)

    def f(*args):
        return flex_attention(*args, hidden)

    args = [t.cuda() for t in test_numbers.qkv(length=test_numbers.LENGTH)]
    with collect() as report:
        found = outcome(f, args, backend="cudnn_flex", options=ALWAYS)
    assert [call.reason.code for call in report.calls] == [Code.FINITE_FILL]
    expected = outcome(f, args)
    if isinstance(expected, str):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
