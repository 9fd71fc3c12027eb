"""Queries, keys and values in unusual layouts, through torch.compile: output and gradients against dense attention.

tests/gpu/test_layouts.py runs the same on a GPU.
"""

import itertools
import random

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from cudnn_flex_compile.report.report import collect
from tests.support import dense, strided
from tests.support.any_torch import numbers

BATCH, HEADS, LENGTH, DIM = 2, 4, 256, 64
HEAD_MAJOR = {
    "gapped": (LENGTH * (DIM + 1), BATCH * LENGTH * (DIM + 1), DIM + 1, 1),  # rows that are no multiple of 8 apart
    "by position": (HEADS * DIM, DIM, BATCH * HEADS * DIM, 1),
    "by batch": (HEADS * LENGTH * DIM, DIM, HEADS * DIM, 1),
}
PAIRS = list(itertools.product(("gapped", "by batch"), ("gapped", "by position")))


def alibi(score, b, h, q, kv):
    return score + torch.exp2(-(h + 1) * 1.0) * (kv - q)


def padded(key, value):
    """Keys and values in these layouts; queries and keys that begin anywhere."""
    shape, rows = (BATCH, HEADS, LENGTH, DIM), LENGTH // 2
    query = ((BATCH, HEADS, rows, DIM), (HEADS * LENGTH * DIM, LENGTH * DIM, DIM, 1), 997)
    start = strided.end(query)
    of_key = (shape, HEAD_MAJOR[key], start + 293)
    return [query, of_key, (shape, HEAD_MAJOR[value], strided.end(of_key))]


def generated(seed):
    chance = random.Random(seed)
    length, dim = chance.choice((128, 192)), 64
    batch, heads, kv_heads = chance.choice(((2, 4, 4), (2, 4, 2), (1, 4, 1), (2, 2, 1)))
    keys = (batch, kv_heads, 128)
    return strided.views_of(chance, [(batch, heads, length, dim), (*keys, dim), (*keys, dim)])


def assert_right(views, device="cpu", inner="aot_eager"):
    """The compiled call is lowered, and it is as near to float64 as stock's rounding, up to a factor of 2."""
    leaves = [t.detach().requires_grad_() for t in strided.tensors(views, torch.bfloat16, device)]
    (*outer, dim), gqa = views[0][0], views[0][0][1] != views[1][0][1]
    drawn = torch.randn(*outer, views[2][0][3], generator=torch.Generator().manual_seed(1))
    grad = drawn.to(device, torch.bfloat16)
    torch._dynamo.reset()
    options = {"lower": "always", "inner_backend": inner}

    @torch.compile(backend="cudnn_flex", fullgraph=True, options=options)
    def run(query, key, value):
        return flex_attention(query * 1.0, key, value, alibi, enable_gqa=gqa)

    with collect() as report:
        out = run(*leaves)
    found = (out.detach(), *torch.autograd.grad(out, leaves, grad))
    assert [call.reason for call in report.calls] == [None], views
    rest = (alibi, None, dim**-0.5, grad)
    (exact, _, *exact_gradients), (stock, _, *gradients) = (
        dense.with_gradients(*leaves, *rest, exact) for exact in (True, False)
    )
    named = zip(("out", "dQ", "dK", "dV"), found, (exact, *exact_gradients), (stock, *gradients), strict=True)
    for name, f, e, s in named:
        assert f.shape == e.shape
        assert (f.double() - e).norm() <= 2 * (s.double() - e).norm(), (name, views)


@pytest.mark.parametrize(("key", "value"), PAIRS)
def test_keys_and_values_with_gaps(trainable, key, value):
    assert_right(padded(key, value))


@pytest.mark.parametrize("seed", numbers(12, with_every_torch=4))
def test_generated_layouts(trainable, seed):
    assert_right(generated(seed))


def test_inductor_takes_them(trainable):
    """Its code asserts that outputs of ops have the strides that their fakes said."""
    assert_right(padded("gapped", "gapped"), inner="inductor")
