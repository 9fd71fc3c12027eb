"""Losses that the log-sum-exp takes part in, on a GPU, against float64: no further off than twice stock precision."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile.bench.mods import MODS, causal, padded, sliding, softcap
from cudnn_flex_compile.reasons import Code
from cudnn_flex_compile.report.report import collect
from tests.gpu.test_numerics import inputs, poison
from tests.measure.learned import FORMS
from tests.support import dense

# Head counts, window and head dim of gpt-oss; its sliding and full layers alternate.
QUERY_HEADS, GROUP, WINDOW, HEAD_DIM = 16, 8, 128, 64
LAYERS = {"sliding": (None, sliding(WINDOW - 1)), "full": (None, causal)}
OTHERS = {
    "no mask": (None, None),
    "soft cap": (softcap(5.0), None),
    "soft cap + causal": (softcap(5.0), causal),
    "soft cap + window": (softcap(5.0), sliding(WINDOW)),
    "rows without a key": (softcap(5.0), lambda b, h, q, kv: q >= kv + 200),
    "any predicate": (softcap(5.0), lambda b, h, q, kv: (q + kv) % 3 != 0),
    "prefix-LM": (None, lambda b, h, q, kv: (q >= kv) | (kv < 300)),
    "squared": (lambda s, b, h, q, kv: s * s * 0.125, causal),
}
OPTIONS = {"inner_backend": "aot_eager", "lower": "always"}


def sink(out, lse, sinks):
    """A further key, whose score is learnt and whose value is zero."""
    return out * torch.sigmoid(lse - sinks.view(-1, 1)).unsqueeze(-1).to(out.dtype)


def compiled(mods, length, entries=None, group=1):
    score_mod, mask_mod = mods
    mask = create_block_mask(mask_mod, entries, None, length, length, device="cuda") if mask_mod else None
    torch._dynamo.reset()

    def attend(q, k, v):
        return flex_attention(q, k, v, score_mod, mask, enable_gqa=group > 1, return_lse=True)

    return torch.compile(attend, backend="cudnn_flex", options=OPTIONS)


def gradients(loss, leaves, out, lse, more=()):
    found = torch.autograd.grad(loss(out, lse, *more), (*leaves, *more), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, (*leaves, *more), strict=True)]


def of_dense(mods, loss, leaves, more, exact):
    copies, extra = ([dense.leaf(t, exact) for t in tensors] for tensors in (leaves, more))
    out, lse = dense.attention(*copies, *mods, copies[0].shape[-1] ** -0.5, exact)
    return [g.nan_to_num() for g in gradients(loss, copies, out, lse, extra)]  # autograd's of rows without a key


def check(mods, loss, leaves, more=(), entries=None, strategy=None):
    group = leaves[0].shape[1] // leaves[1].shape[1]
    with collect() as report:
        out, lse = compiled(mods, leaves[0].shape[2], entries, group)(*leaves)
    assert [str(c.reason) for c in report.kept] == []
    poison()
    found = gradients(loss, leaves, out, lse, more)
    exact, stock = (of_dense(mods, loss, leaves, more, exact) for exact in (True, False))
    for label, f, e, s in zip(("dQ", "dK", "dV", "more"), found, exact, stock, strict=False):
        assert bool(f.isfinite().all()), label
        error, allowed = (f - e).norm(), 2 * (s - e).norm()
        assert error <= allowed, f"{label}: {error / e.norm():.2e}, stock {allowed / 2 / e.norm():.2e}"
    backward = report.lowered[0].strategies[1]
    assert strategy is None or strategy in backward, backward


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("length", [512, 1000, 2048])
def test_attention_sinks(layer, length):
    """As gpt-oss has them; the sinks' own gradient, too."""
    *leaves, grad = inputs(HEAD_DIM, length, torch.bfloat16, GROUP, heads=QUERY_HEADS)
    sinks = torch.randn(QUERY_HEADS, device="cuda", requires_grad=True)

    def loss(out, lse, sinks):
        return (sink(out, lse, sinks).double() * grad.double()).sum()

    check(LAYERS[layer], loss, leaves, [sinks])


LOSSES = {
    "both": lambda out, lse: (out.double() ** 2).sum() + (torch.where(lse > -math.inf, lse, 0.0).sin() * 8).sum(),
    "the log-sum-exp alone": lambda out, lse: torch.where(lse > -math.inf, lse, 0.0).sin().sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", [*OTHERS, *(n for n in MODS if n not in OTHERS)])
@pytest.mark.parametrize(("head_dim", "length", "group"), [(64, 1000, 1), (128, 1024, 4), (128, 1000, 1)])
def test_losses_of_the_log_sum_exp(name, head_dim, length, group, loss):
    *leaves, _ = inputs(head_dim, length, torch.bfloat16, group)
    mods = OTHERS.get(name) or MODS[name](4, length, "cuda")
    check(mods, LOSSES[loss], leaves)


WEIGHTED = {
    "sinks": lambda out, lse, weight: (sink(out, lse, lse.new_zeros(lse.shape[1])).double() * weight.double()).sum(),
    "the log-sum-exp alone": lambda out, lse, weight: (lse * weight[..., 0].to(lse.dtype)).sum(),
}
DRAWS = 32  # of the loss: a bias of few numbers has a gradient of few numbers, and an error of few
# What certification keeps, of dBias with operands at their extremes (H200, cuDNN 9.19): forms of the native plan at one
# head dim and length. All else is lowered.
KEPT = {("[H, S, S], causal", 128, 1000), ("slopes", 128, 1000)}


@pytest.mark.parametrize("loss", WEIGHTED)
@pytest.mark.parametrize("form", ["T5", "relative table, window", "[H, S, S], causal", "Graphormer", "slopes"])
@pytest.mark.parametrize(("head_dim", "length", "group"), [(64, 512, 1), (64, 1000, 2), (128, 1000, 1)])
def test_learned_biases(form, loss, head_dim, length, group):
    """Their gradients by the yardstick of test_learned.py."""
    *leaves, weight = inputs(head_dim, length, torch.bfloat16, group)
    draws = [torch.randn_like(weight) for _ in range(DRAWS)]
    learned, make, mask_mod = FORMS[form](*leaves[0].shape[:3])
    scale = head_dim**-0.5
    with collect() as report:
        result = compiled((make(*learned), mask_mod), length, group=group)(*leaves)
    (call,) = report.calls
    if (form, head_dim, length) in KEPT and call.reason is not None:
        assert call.reason.code is Code.CERTIFICATION, call.reason
    else:
        assert (call.reason, call.strategies) == (None, ("native", "native, folded"))

    def of_draws(out, lse, of):
        found = []
        for draw in draws:
            poison()
            of_loss = WEIGHTED[loss](out, lse, draw)
            some = torch.autograd.grad(of_loss, of, retain_graph=True, allow_unused=True)
            found.append([torch.zeros_like(t) if g is None else g for g, t in zip(some, of, strict=True)])
        return found

    def by_dense(exact):
        copies, own = ([dense.leaf(t, exact) for t in tensors] for tensors in (leaves, learned))
        return of_draws(*dense.attention(*copies, make(*own), mask_mod, scale, exact), [*copies, *own])

    found, exact, stock = of_draws(*result, [*leaves, *learned]), by_dense(True), by_dense(False)
    outputs = [t.detach().requires_grad_() for t in dense.attention(*leaves, make(*learned), mask_mod, scale, False)]
    own = [dense.leaf(t, True) for t in learned]
    for row, (grad, grad_lse) in zip(stock, of_draws(*outputs, outputs), strict=True):
        how = make(*own), mask_mod, scale, grad, own, torch.bfloat16, grad_lse.unsqueeze(-1)
        of_biases = dense.captured_gradients(*leaves, *how)
        row[3:] = [g.to(t.dtype) for g, t in zip(of_biases, learned, strict=True)]
    labels = ("dQ", "dK", "dV", "bias")
    for label, *rows in zip(labels, *(zip(*of, strict=True) for of in (found, exact, stock)), strict=True):
        f, e, s = (torch.stack(tensors).double() for tensors in rows)
        assert bool(f.isfinite().all()), label
        error, allowed = (f - e).norm(), 2 * (s - e).norm()
        assert error <= allowed, f"{label}: {error / e.norm():.2e}, stock {allowed / 2 / e.norm():.2e}"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", [512, 1000])
def test_lengths_of_batch_entries(head_dim, length):
    *leaves, _ = inputs(head_dim, length, torch.bfloat16, 1)
    lengths = torch.tensor([length // 3, length], device="cuda", dtype=torch.int32)
    check((None, padded(lengths)), LOSSES["both"], leaves, entries=2, strategy="folded")


def test_the_loss_says_at_each_step_what_takes_part():
    """One compiled function, and the plans of both backwards."""
    *leaves, _ = inputs(64, 512, torch.bfloat16, 1)
    attend = compiled((softcap(5.0), causal), 512)
    for loss in (*LOSSES.values(), lambda out, lse: (out.double() ** 2).sum(), LOSSES["both"]):
        found = gradients(loss, leaves, *attend(*leaves))
        exact, stock = (of_dense((softcap(5.0), causal), loss, leaves, (), exact) for exact in (True, False))
        for f, e, s in zip(found, exact, stock, strict=True):
            assert (f - e).norm() <= 2 * (s - e).norm()
