"""Score_mods that stop gradients, and grad modes around calls, on the CPU: the gradients are autograd's."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from cudnn_flex_compile.reasons import Code
from cudnn_flex_compile.report.report import collect
from tests.support.any_torch import numbers
from tests.support.gradients import Straight, differences, inputs

OPTIONS = {"lower": "always", "inner_backend": "aot_eager"}


@pytest.mark.parametrize("number", numbers(75, with_every_torch=20))
def test_gradients_are_those_of_autograd(number, trainable):
    """Of 75 graphs of four calls each."""
    with collect() as report:
        wrong = differences(number, "cpu", **OPTIONS)
    assert not wrong, report
    assert {call.reason.code for call in report.kept} <= {Code.NO_BACKWARD, Code.CAPTURED_GRADIENT}, report


def gradients(function, given):
    return torch.autograd.grad(function(*given).float().square().sum(), given[:5], allow_unused=True)


def relative(table):
    return lambda s, b, h, q, kv: s + table[h, q - kv + 64]


def after_passes_without_gradients(query, key, value, slopes, table, _):
    with torch.no_grad():
        for _ in range(2):
            value = value + flex_attention(query, key, value, score_mod=relative(table))
    return flex_attention(query, key, value, score_mod=relative(table))


def test_a_bias_that_is_first_read_without_gradients_is_trained(trainable):
    function = after_passes_without_gradients
    given = inputs(torch.bfloat16, "cpu")
    wanted = gradients(function, [t.detach().float().requires_grad_(t.requires_grad) for t in given])
    with collect() as report:
        found = gradients(torch.compile(function, backend="cudnn_flex", options=OPTIONS), given)
    assert not report.kept
    for name, want, got in zip(("dQ", "dK", "dV", "dSlopes", "dRelative"), wanted, found, strict=True):
        assert (want is None) == (got is None), name
        if want is not None:
            assert (got.float() - want).norm() <= 0.03 * want.norm(), name


class Without(torch.nn.Module):
    @torch.no_grad()
    def forward(self, query, key, value, slopes, table, _):
        return flex_attention(query, key, value, score_mod=lambda s, b, h, q, kv: s * table[h, q - kv + 64])


@pytest.mark.parametrize("model", [Without(), torch.no_grad()(Without.forward.__wrapped__)])
def test_nothing_is_learned_where_a_forward_has_no_gradients(model, trainable):
    """A captured parameter may do anything there."""
    given = inputs(torch.bfloat16, "cpu")
    given = given if isinstance(model, Without) else [None, *given]
    with collect() as report:
        assert not torch.compile(model, backend="cudnn_flex", options=OPTIONS)(*given).requires_grad
    assert len(report.lowered) == 1


def test_an_autograd_function_of_a_score_mod_is_kept_where_it_has_a_gradient(trainable):
    function = torch.compile(
        lambda query, key, value, *_: flex_attention(
            query, key, value, score_mod=lambda s, b, h, q, kv: s + Straight.apply(s)
        ),
        backend="cudnn_flex", options=OPTIONS,
    )  # fmt: skip
    given = inputs(torch.bfloat16, "cpu")
    with collect() as report:
        function(*given)
    assert report.kept[0].reason.code is Code.NO_BACKWARD
    assert "autograd.Function" in report.kept[0].reason.detail
    with torch.no_grad(), collect() as report:
        function(*given)
    assert not report.kept
