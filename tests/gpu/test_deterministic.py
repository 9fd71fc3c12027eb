"""With torch.use_deterministic_algorithms(True) every run gives the same bits, gradients too, or the call is kept.

Knows nothing of numbers (test_numerics.py).
"""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import cache_clear
from cudnn_flex_compile.bench.mods import ALL, BY_BATCH
from cudnn_flex_compile.report.report import collect
from tests.fuzzing.judge import poison

BATCH, HEADS, KV_HEADS, DIM, REPEATS = 2, 8, 2, 128, 100
# Calls by tile lists are in test_plain_masks.py.
OPTIONS = {"inner_backend": "aot_eager", "lower": "always", "strategy": "graphs"}


def any_predicate(heads, length, device):
    return ALL["soft cap"](heads, length, device)[0], lambda b, h, q, kv: (q + kv) % 3 != 0


# By mod: the length, and what the strategies of forward and backward must begin with.
CASES = {
    "causal": (4096, ("native", "native")),
    "sliding window": (4096, ("native", "native")),
    "padded lengths": (2000, ("chained", "")),  # native is wrong for lengths of 0
    "soft cap + causal": (4096, ("chained", "chained")),
    "ALiBi + causal": (2000, ("chained", "chained")),
    "documents": (2048, ("chained", "chained")),
    "relative table": (1000, ("chained", "chained")),
    "any predicate": (2048, ("dense", "dense")),
    "prefix-LM": (4096, ("parts", "parts")),
    "symmetric window": (4096, ("chained", "parts")),
    "causal + padding, scattered": (4096, ("chained", "chained")),
}


@pytest.fixture(autouse=True)
def deterministic():
    torch._dynamo.reset()
    cache_clear()
    yield
    torch.use_deterministic_algorithms(False)


def inputs(length):
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(heads):
        shape = (BATCH, length, heads, DIM)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator).transpose(1, 2)

    return [draw(h).requires_grad_() for h in (HEADS, KV_HEADS, KV_HEADS)], draw(HEADS)


def bits(tensor):
    return tensor.detach().contiguous().view(torch.int16)


@pytest.mark.parametrize("name", CASES)
def test_every_run_gives_the_same_bits(name):
    length, strategies = CASES[name]
    make = any_predicate if name == "any predicate" else ALL[name]
    score_mod, mask_mod = make(HEADS, length, "cuda")
    entries = BATCH if name in BY_BATCH else None
    mask = create_block_mask(mask_mod, entries, None, length, length, device="cuda") if mask_mod else None
    leaves, grad = inputs(length)
    torch.use_deterministic_algorithms(True)
    attention = torch.compile(
        lambda q, k, v: flex_attention(q, k, v, score_mod, mask, enable_gqa=True), backend="cudnn_flex", options=OPTIONS
    )
    with collect() as report:
        attention(*leaves)
    if report.kept:
        pytest.skip(f"kept: {report.kept[0].reason}")
    assert len(report.lowered[0].strategies) == 2
    for found, expected in zip(report.lowered[0].strategies, strategies, strict=True):
        assert found.startswith(expected), report.lowered[0].strategies
    check_repeats(attention, leaves, grad)


def check_repeats(attention, leaves, grad):
    """In another place of memory and beside other work at each run, so that blocks of threads take other turns."""
    other, noise, kept, first = torch.cuda.Stream(), torch.ones(2**22, device="cuda"), [], None
    for run in range(REPEATS):
        if run % 10 == 0:
            poison()
            kept.append(torch.full((2**17 * (1 + run),), math.nan, device="cuda"))
        with torch.cuda.stream(other):
            noise.mul_(1.0)
        out = attention(*leaves)
        found = [bits(t) for t in (out, *torch.autograd.grad(out, leaves, grad))]
        first = first or found
        for label, one, another in zip(("out", "dQ", "dK", "dV"), first, found, strict=True):
            different = int((one != another).sum())
            assert not different, f"{label} differs in {different} elements at run {run}"


def test_both_modes_have_plans_of_their_own():
    """A plan that was made before the mode was set is not used under it."""
    leaves, _ = inputs(512)
    attention = torch.compile(lambda q, k, v: flex_attention(q, k, v, enable_gqa=True), backend="cudnn_flex",
                              options=OPTIONS)  # fmt: skip
    from cudnn_flex_compile import cache_info

    attention(*leaves)
    before = cache_info().builds
    torch.use_deterministic_algorithms(True)
    attention(*leaves)
    assert cache_info().builds > before
