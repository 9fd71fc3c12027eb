"""With torch.use_deterministic_algorithms(True) every run gives the same bits, gradients too, or the call is kept.

By graphs, and by tile lists, whose numbers are checked as well.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import cache_clear
from cudnn_flex_compile.bench.mods import ALL, BY_BATCH
from cudnn_flex_compile.engine.tiles import ordered
from cudnn_flex_compile.engine.tiles.frontend import kernels_missing
from cudnn_flex_compile.report.report import collect
from tests.fuzzing.judge import poison
from tests.support import plain_masks
from tests.support.documents import causal_documents, layout

BATCH, HEADS, KV_HEADS, DIM, REPEATS = 2, 8, 2, 128, 100
NINETY = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
by_lists = pytest.mark.skipif(not NINETY or kernels_missing() is not None, reason="no kernels by tile lists here")
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


# Calls by tile lists: heads, kv heads, head dim, value dim, dtype.
DIMS = {
    "64, grouped": (4, 2, 64, 64, torch.bfloat16), "128": (4, 4, 128, 128, torch.bfloat16),
    "128, grouped": (8, 1, 128, 128, torch.float16),
    "192, 128": (4, 4, 192, 128, torch.bfloat16), "256, grouped": (4, 2, 256, 256, torch.bfloat16),
    "256": (4, 4, 256, 256, torch.bfloat16),
}  # fmt: skip
OTHER_TILES = "256"


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


def documents(batch, length, device):
    return causal_documents(layout(1, batch, length, 12).to(device))


MASKS = {name: plain_masks.MASKS[name] for name in ("causal", "sinks + window", "right padding")}
MASKS["documents"] = documents


def call_by_lists(how, name, length=1000):
    """A compiled call, its inputs, its gradient and its mask_mod."""
    heads, kv_heads, dim, value_dim, dtype = DIMS[how]
    qkv, grad = plain_masks.inputs(BATCH, length, heads, kv_heads, dim, dtype, "cuda", value_dim)
    mask_mod = MASKS[name](BATCH, length, "cuda")
    mask = plain_masks.block_mask(mask_mod, BATCH, length, "cuda")
    options = {"strategy": "tile_lists"}
    function = torch.compile(plain_masks.attend, backend="cudnn_flex", dynamic=False, options=options)
    return lambda q, k, v: function(q, k, v, mask), qkv, grad, mask_mod


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
        first = found if first is None else first
        for label, one, another in zip(("out", "dQ", "dK", "dV"), first, found, strict=True):
            different = int((one != another).sum())
            assert not different, f"{label} differs in {different} elements at run {run}"


@by_lists
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("how", DIMS)
def test_every_run_by_a_list_gives_the_same_bits(how, name):
    attention, qkv, grad, mask_mod = call_by_lists(how, name)
    torch.use_deterministic_algorithms(True)
    with collect() as report:
        out = attention(*qkv)
    if how == OTHER_TILES:
        assert "takes a list of its own" in report.calls[0].reason.detail
        return
    assert report.calls[0].strategies == ("tile_lists", "tile_lists"), report.calls[0].reason
    found = (out.detach(), *torch.autograd.grad(out, qkv, grad))
    check_repeats(attention, qkv, grad)
    torch.use_deterministic_algorithms(False)  # the reference may use any algorithm
    plain_masks.assert_right_numbers(found, qkv, grad, mask_mod)


@by_lists
def test_lists_take_one_direction_where_the_other_has_other_tiles():
    """The forward runs by a list, and the backward by a graph."""
    _, qkv, grad, mask_mod = call_by_lists(OTHER_TILES, "causal", 4096)
    mask = plain_masks.block_mask(mask_mod, BATCH, 4096, "cuda")
    function = torch.compile(plain_masks.attend, backend="cudnn_flex", options={"lower": "always"})
    torch.use_deterministic_algorithms(True)
    with collect() as report:
        out = function(*qkv, mask)
    assert len(report.calls[0].strategies) == 2, report.calls[0].reason
    assert report.calls[0].strategies[1] != "tile_lists"
    found = (out.detach(), *torch.autograd.grad(out, qkv, grad))
    check_repeats(lambda q, k, v: function(q, k, v, mask), qkv, grad)
    torch.use_deterministic_algorithms(False)
    plain_masks.assert_right_numbers(found, qkv, grad, mask_mod)


@by_lists
@pytest.mark.parametrize("kind", [("1", "128", "128", "bfloat16"), ("4", "64", "64", "float16")])
def test_the_process_that_tries_whether_kernels_end(kind):
    assert ordered._watched((*kind, str(torch.cuda.current_device()))) == ordered.ENDS


SCRIPT = """
import hashlib, sys, torch
from tests.gpu import test_deterministic as tests
torch.use_deterministic_algorithms(True)
noise, other = torch.ones(2**24, device="cuda"), torch.cuda.Stream()
for attention, leaves, grad in tests.calls_of_both_kinds():
    if sys.argv[1] == "busy":
        with torch.cuda.stream(other):
            for _ in range(200):
                noise.mul_(1.0)
    out = attention(*leaves)
    for tensor in (out, *torch.autograd.grad(out, leaves, grad)):
        print(hashlib.sha256(tests.bits(tensor).cpu().numpy().tobytes()).hexdigest())
"""


def calls_of_both_kinds():
    """By graphs, and by tile lists where there are kernels for them."""
    score_mod, mask_mod = ALL["soft cap + causal"](HEADS, 1000, "cuda")
    mask = create_block_mask(mask_mod, None, None, 1000, 1000, device="cuda")
    leaves, grad = inputs(1000)
    yield torch.compile(
        lambda q, k, v: flex_attention(q, k, v, score_mod, mask, enable_gqa=True), backend="cudnn_flex", options=OPTIONS
    ), leaves, grad
    if NINETY and kernels_missing() is None:
        yield call_by_lists("128", "documents")[:3]


def test_two_processes_give_the_same_bits():
    """One of them beside other work on the GPU."""
    command = [sys.executable, "-c", SCRIPT]
    quiet, busy = (
        subprocess.run([*command, how], env=os.environ, capture_output=True, text=True, timeout=600)
        for how in ("quiet", "busy")
    )
    assert (quiet.returncode, busy.returncode) == (0, 0), quiet.stderr + busy.stderr
    digests, others = ([line for line in ran.stdout.split() if len(line) == 64] for ran in (quiet, busy))
    assert digests
    assert digests == others


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
