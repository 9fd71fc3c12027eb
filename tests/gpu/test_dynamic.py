"""Shapes that change, on the GPU: a plan for each within the bound, right results, no recompiles, and flat memory.

`python3 -m pytest -s tests/gpu/test_dynamic.py` prints what it took.
"""

import gc
import os
import random
import time

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from cudnn_flex_compile import cache_clear, cache_info, collect
from cudnn_flex_compile.bench.mods import causal
from cudnn_flex_compile.kernels import cuda
from cudnn_flex_compile.reasons import Code, Reason
from tests.support import dense

HEADS, DIM, BOUND = 2, 64, 64
MIB = 2**20
# What may differ between two moments when as many plans are held: kernels that cuDNN and torch load once, heaps.
DEVICE_SLACK, HOST_SLACK = 64 * MIB, 64 * MIB


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    torch._dynamo.reset()
    cache_clear()
    torch.manual_seed(0)
    monkeypatch.setenv("CUDNN_FLEX_PLAN_CACHE_SIZE", str(BOUND))
    yield
    cache_clear()


def masked_cap(score, b, h, q, kv):
    return torch.where(q >= kv, torch.tanh(score / 3.0) * 3.0, -float("inf"))


def soft_cap(score, b, h, q, kv):
    return torch.tanh(score / 3.0) * 3.0


def compiled(dynamic=True, **options):
    options = {"inner_backend": "aot_eager", "lower": "always", **options}
    return torch.compile(
        lambda q, k, v: flex_attention(q, k, v, masked_cap), backend="cudnn_flex", dynamic=dynamic, options=options
    )


def draw(length, batch=1, requires_grad=False):
    return [
        torch.randn(batch, length, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_(requires_grad)
        for _ in range(3)
    ]


def assert_right(out, qkv, gradients=(), grad=None):
    grad = torch.zeros_like(out) if grad is None else grad
    arguments = (soft_cap, causal, DIM**-0.5, grad)
    with torch.enable_grad():
        exact, stock = (dense.with_gradients(*qkv, *arguments, exact=e) for e in (True, False))
    for f, e, s in zip((out.detach(), None, *gradients), exact, stock, strict=False):
        assert f is None or (f - e).norm() <= 2 * (s - e).norm() + 1e-6


def memory():
    """Bytes in use on the device, by all of this process and others, and of this process on the host."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    with open("/proc/self/statm") as file:
        return total - free, int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def assert_flat(before, after):
    grown = [new - old for old, new in zip(before, after, strict=True)]
    print(f"memory grew by {grown[0] / MIB:.1f} MiB on the device, {grown[1] / MIB:.1f} MiB on the host")
    assert grown[0] <= DEVICE_SLACK
    assert grown[1] <= HOST_SLACK


def test_two_hundred_lengths(alone):
    """Of the 200 plans 136 are dropped; the second hundred takes no more memory than the first."""
    function, begun = compiled(), time.perf_counter()
    with torch.no_grad(), collect() as report:
        for number, length in enumerate(range(130, 130 + 3 * 200, 3)):
            qkv = draw(length)
            out = function(*qkv)
            if number % 10 == 0:
                assert_right(out, qkv)
            if number == 99:
                before = memory()
    info = cache_info()
    print(f"200 lengths: {time.perf_counter() - begun:.1f} s, {report.seconds}, {info}")
    assert_flat(before, memory())
    report.assert_no_recompiles()
    report.assert_all_lowered()
    assert (info.size, info.evictions) == (BOUND, 200 - BOUND)


def test_ten_thousand_calls_over_three_hundred_shapes(alone, monkeypatch, tmp_path):
    """Near lengths come soon after each other, and all come round three times: most calls find their plan; each shape
    is built once, and what was dropped comes back from the cache folder.
    """
    monkeypatch.setenv("CUDNN_FLEX_CACHE", "1")
    monkeypatch.setenv("CUDNN_FLEX_CACHE_DIR", str(tmp_path))
    calls, shapes, near = 10_000, [64 + 2 * i for i in range(300)], 40
    function, choose, begun = compiled(), random.Random(0), time.perf_counter()
    inputs = {length: draw(length) for length in shapes}
    with torch.no_grad(), collect() as report:
        for number in range(calls):
            qkv = inputs[shapes[(number * 3 * len(shapes) // calls + choose.randrange(near)) % len(shapes)]]
            out = function(*qkv)
            if number % 100 == 0:
                assert_right(out, qkv)
            if number == 2 * calls // 3:
                before = memory()
    info = cache_info()
    print(f"10000 calls, 300 shapes: {time.perf_counter() - begun:.1f} s, {report.seconds}, {info}")
    assert_flat(before, memory())
    report.assert_no_recompiles()
    assert info.restored > 0
    assert (info.size, info.evictions) == (BOUND, len(shapes) + info.restored - BOUND)
    assert info.hits > 0.8 * calls


def test_training_at_new_batches_and_lengths():
    function, begun = compiled(), time.perf_counter()
    with collect() as report:
        for batch, length in ((3, 256), (4, 320), (7, 1000), (3, 77), (5, 192)):
            qkv = draw(length, batch, requires_grad=True)
            out = function(*qkv)
            grad = torch.randn_like(out)
            assert_right(out, qkv, torch.autograd.grad(out, qkv, grad), grad)
    print(f"5 shapes, with gradients: {time.perf_counter() - begun:.1f} s")
    report.assert_no_recompiles()
    # AOTAutograd makes gradients of its outputs contiguous; the first shape had a plan for one laid out like the output
    assert cache_info().size == 10 + 1


def test_marked_dimensions():
    function = compiled(dynamic=None)
    with torch.no_grad(), collect() as report:
        for batch, length in ((3, 256), (4, 320), (7, 1000)):
            qkv = draw(length, batch)
            for tensor in qkv:
                torch._dynamo.mark_dynamic(tensor, 0)
                torch._dynamo.mark_dynamic(tensor, 2)
            assert_right(function(*qkv), qkv)
    report.assert_no_recompiles()


def test_shapes_without_a_plan_run_on_inductor_and_recompile_nothing(monkeypatch):
    """More of them than Dynamo compiles one piece of code for."""
    function, find, begun = compiled(), cuda.find_plan, time.perf_counter()
    refusal = Reason(Code.CERTIFICATION, "for the test")
    with torch.no_grad():
        function(*draw(256))
        monkeypatch.setattr(cuda, "find_plan", lambda call: refusal if call[2][2] != 512 else find(call))
        with collect() as report:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            for length in (*range(300, 312), 512):
                qkv = draw(length)
                assert_right(function(*qkv), qkv)
            compiled_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    print(f"12 lengths on Inductor: {time.perf_counter() - begun:.1f} s, {compiled_graphs} graphs")
    assert report.counts["graphs"] == 0
    assert 1 <= compiled_graphs <= 3
