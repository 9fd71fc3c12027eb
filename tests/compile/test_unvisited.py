"""Captured tensors read at indices that hold where a pair is visible, and may be anything elsewhere.

Stock flex_attention evaluates no function in blocks that the BlockMask omits, and masks what it reads beside them. What
is computed outside the kernel, drawn or checked reads there, too. On the CPU an index out of range raises; on a GPU it
would end all work of the process there.
"""

import math
import random
from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import collect
from cudnn_flex_compile.engine.key import problem_of
from cudnn_flex_compile.passes import contenders
from cudnn_flex_compile.passes.decide import candidate
from tests.compile.test_backend import fresh, mask_of, qkv, run

__all__ = ["fresh"]

PAGE, PAGES = 32, 4
LENGTH = PAGE * PAGES


def paged(number, device="cpu", learned=True):
    """score_mod, mask_mod, the table, and the bias over visible pairs, of one generated table of pages."""
    chance = random.Random(number)
    live = chance.randint(1, PAGES - 1)
    pages = list(range(live)) + [-chance.randint(1, 9)] * (PAGES - live)
    chance.shuffle(pages)
    page = torch.tensor(pages, device=device, dtype=chance.choice((torch.int32, torch.int64)))
    spread = chance.choice((1, 2))
    size = spread * (LENGTH + PAGE * live)
    table = torch.randn(size, generator=torch.Generator().manual_seed(number)).to(device).requires_grad_(learned)
    shift = spread * (PAGE * live - 1)

    def logical(kv):
        return page[kv // PAGE] * PAGE + kv % PAGE

    def score_mod(s, b, h, q, kv):
        at = logical(kv)
        return torch.where(at >= 0, s + table[(q - at) * spread + shift], -math.inf)

    def mask_mod(b, h, q, kv):
        return logical(kv) >= 0

    q, kv = torch.arange(LENGTH, device=device).view(-1, 1), torch.arange(LENGTH, device=device)
    index, seen = (q - logical(kv)) * spread + shift, mask_mod(0, 0, q, kv)
    assert index[:, seen].min() >= 0
    assert index[:, seen].max() < size
    assert index.max() >= size, "all indices are in range"

    def bias(leaf):
        return torch.where(seen, leaf[torch.where(seen, index, 0)], -math.inf)

    return score_mod, mask_mod, table, bias


def gradients_of(out, leaves, grad):
    return torch.autograd.grad(out, leaves, grad.to(out.dtype))


def compare(number, device="cpu", blocks=True, **options):
    """Output and gradients of a paged call, with its mask as a BlockMask or in the score_mod alone."""
    score_mod, mask_mod, table, bias = paged(number, device)
    block = PAGE if blocks else None
    blocked = block and create_block_mask(mask_mod, None, None, LENGTH, LENGTH, device=device, BLOCK_SIZE=block)
    with torch.enable_grad():
        args = [t.to(device).requires_grad_() for t in qkv(length=LENGTH, **options.pop("how", {}))]
        grad = torch.randn(args[0].shape).to(args[0])
        options = {"lower": "always", **options}
        found, calls = run(lambda q, k, v: flex_attention(q, k, v, score_mod, blocked), *args, **options)
        mine = [found, *gradients_of(found, [*args, table], grad)]
        exact = [t.detach().double().requires_grad_() for t in (*args, table)]
        scores = exact[0] @ exact[1].mT / math.sqrt(args[0].shape[3]) + bias(exact[3])
        right = scores.softmax(-1) @ exact[2]
        wanted = [right, *gradients_of(right, exact, grad)]
    for name, a, e in zip(("out", "dQ", "dK", "dV", "the table"), mine, wanted, strict=True):
        off, allowed = float((a.double() - e).norm()), 0.02 * float(e.norm()) + 1e-3
        assert off < allowed, f"{number}, {name}: off by {off:.2e}, allowed {allowed:.2e}"
    return calls


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("number", range(6))
def test_paged_indices_that_hold_where_a_pair_is_visible(number, blocks, trainable):
    calls = compare(number, blocks=blocks)
    assert calls[0].reason is None, str(calls[0].reason)


@pytest.mark.parametrize("number", range(3))
def test_no_inner_backend_raises(number):
    """Inductor checks indices where it cannot prove that they are in range."""
    torch._dynamo.reset()
    score_mod, mask_mod, _, _ = paged(number, learned=False)
    mask = mask_of(mask_mod, LENGTH, BLOCK_SIZE=PAGE)
    with collect() as report:
        torch.compile(flex_attention, backend="cudnn_flex", options={"lower": "always"})(
            *qkv(length=LENGTH), score_mod=score_mod, block_mask=mask
        )
    assert not report.kept
    assert "cannot be drawn" not in str(report.calls[0].picture)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("number", range(6))
def test_certification_reads_nothing_out_of_range(number, drawn, monkeypatch):
    """With the real tensors and with such as are made up: evaluated on the CPU, where such a read raises."""
    score_mod, mask_mod, _, _ = paged(number, learned=False)
    mask = mask_of(mask_mod, LENGTH, BLOCK_SIZE=PAGE)
    sampled = []

    def judge(asked):
        problem = problem_of(candidate.forward_call(asked, asked.running, torch.device("cpu")))
        made = candidate._reference(asked)
        if drawn:
            made = replace(made, captured=tuple(replace(c, real=None) for c in made.captured))
        for extremes in (False, True):
            sample = made.sample(problem, torch.Generator().manual_seed(number), extremes)
            zero, every = torch.zeros(1, dtype=torch.int64), torch.arange(LENGTH)
            masked = sample.masked(torch.zeros(1, LENGTH, LENGTH), zero, zero, every, every)
            (bias,) = [t for t in sample.operands if t.shape[2:] == masked.shape[1:] and t.dtype == torch.float32]
            seen = masked[0] > -math.inf
            assert torch.equal(masked[0][seen], bias[0, 0][seen])
            sampled.append(sample)
        return real(asked)

    real = contenders.plan_or_reason
    monkeypatch.setattr(contenders, "plan_or_reason", judge)
    run(lambda q, k, v: flex_attention(q, k, v, score_mod, mask), *qkv(length=LENGTH), lower="always")
    assert len(sampled) == 2


def test_an_empty_tensor_that_nobody_reads():
    empty = torch.empty(0)

    def score_mod(s, b, h, q, kv):
        return torch.where(q < 0, s + empty[kv], s)

    def mask_mod(b, h, q, kv):
        return q >= kv

    out, calls = run(lambda q, k, v: flex_attention(q, k, v, score_mod, mask_of(mask_mod)), *qkv(), lower="always")
    assert calls
    assert out.isfinite().all()
