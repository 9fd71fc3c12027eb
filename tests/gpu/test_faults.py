"""What goes wrong around real plans stops no model: no memory, threads, a fork, the end of the interpreter.

Knows nothing of what stand-ins can show (tests/unit/test_faults.py).
"""

import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import cache_clear, cache_info
from cudnn_flex_compile.bench.mods import causal, softcap
from cudnn_flex_compile.reasons import Code
from cudnn_flex_compile.report.report import collect
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.text import text
from tests.support import dense

ROOT = Path(__file__).parents[2]
MIB = 2**20


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    cache_clear()
    torch.manual_seed(0)


def draw(batch=2, heads=4, length=256, dim=64):
    tensor = torch.randn(batch, length, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    return tensor.requires_grad_()


def compiled(inner_backend="aot_eager"):
    def call(q, k, v, mask):
        return flex_attention(q, k, v, softcap(2.0), mask)

    return torch.compile(call, backend="cudnn_flex", options={"inner_backend": inner_backend, "lower": "always"})


def block_mask(length):
    return create_block_mask(causal, None, None, length, length, device="cuda")


def assert_right(out, qkv, grad, gradients):
    scale = 1 / math.sqrt(qkv[0].shape[-1])
    plain = [t.detach() for t in qkv]
    exact, stock = (dense.with_gradients(*plain, softcap(2.0), causal, scale, grad, exact=e) for e in (True, False))
    for f, e, s in zip((out.detach(), *gradients), (exact[0], *exact[2:]), (stock[0], *stock[2:]), strict=True):
        assert (f - e).norm() <= 2 * (s - e).norm() + 1e-6


def test_without_memory_for_a_workspace_the_call_runs_on_inductor(monkeypatch, caplog):
    from cudnn_flex_compile.engine.plans import graph_plan
    from cudnn_flex_compile.kernels import cuda

    qkv, mask, asked = [draw() for _ in range(3)], block_mask(256), []
    model = compiled()
    grad = torch.randn_like(model(*qkv, mask))

    def no_memory(*layout):
        asked.append(layout)
        raise torch.OutOfMemoryError("for the test")

    monkeypatch.setattr(cuda, "_warned", set())
    monkeypatch.setattr(graph_plan, "empty", no_memory)
    out = model(*qkv, mask)
    gradients = torch.autograd.grad(out, qkv, grad)
    assert asked, "no plan of this call has a workspace"
    assert "for the test" in caplog.text
    assert_right(out, qkv, grad, gradients)


def test_without_memory_to_certify_the_call_is_kept_until_there_is_some():
    """The call itself fits: its output is as large as one of its inputs."""
    qkv = [draw(4, 8, 8192, 128).detach() for _ in range(3)]
    size = qkv[0].numel() * 2
    mask = block_mask(8192)
    model = compiled("inductor")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size + 64 * MIB) / total)
    try:
        with torch.no_grad(), collect() as report:
            out = model(*qkv, mask)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [c.reason and c.reason.code for c in report.calls] == [Code.MEMORY]
    assert bool(out.isfinite().all())
    torch._dynamo.reset()
    cache_clear()
    with torch.no_grad(), collect() as report:
        again = model(*qkv, mask)
    assert not report.kept, report.kept[0].reason
    assert (again - out).norm() <= 2e-2 * out.norm()


OTHERS = "using FX to symbolically trace a dynamo-optimized function"


def patient(call):
    for _ in range(600):
        try:
            return call()
        except RuntimeError as error:
            if OTHERS not in str(error):
                raise
            time.sleep(0.1)
    raise TimeoutError


def test_threads_compile_and_run_the_same_model():
    """Each on a stream of its own, forward and backward. With any backend, torch 2.11 raises OTHERS in a thread that
    calls a compiled function while another one compiles it: such a call is made again.
    """
    qkv, mask = [draw() for _ in range(3)], block_mask(256)
    grad = torch.randn_like(qkv[0])
    torch.autograd.grad(compiled()(*qkv, mask), qkv, grad)
    of_one = cache_info().builds
    torch._dynamo.reset()
    cache_clear()
    model, results = compiled(), []
    torch.cuda.synchronize()
    barrier = threading.Barrier(4)

    def body():
        barrier.wait()
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(10):
                    out = patient(lambda: model(*qkv, mask))
                    gradients = torch.autograd.grad(out, qkv, grad)
            stream.synchronize()
            results.append((out, gradients))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=body) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert isinstance(result, tuple), result
        assert_right(result[0], qkv, grad, result[1])
    assert len(results) == 4
    assert cache_info().builds == of_one


MODEL = """
import os, sys, torch
from torch.nn.attention.flex_attention import flex_attention
from cudnn_flex_compile import cache_info
def run(device):
    torch._dynamo.reset()
    q = torch.randn(2, 4, 256, 64, device=device, dtype=torch.bfloat16, requires_grad=device == "cuda")
    options = {"inner_backend": "aot_eager", "lower": "always"}
    def call(q):
        return flex_attention(q, q, q, lambda s, b, h, i, j: torch.where(i >= j, torch.tanh(s / 2) * 2, -float("inf")))
    out = torch.compile(call, backend="cudnn_flex", options=options)(q)
    if device == "cuda":
        out.sum().backward()
        torch.cuda.synchronize()
        assert cache_info().size >= 2, cache_info()
    assert bool(out.isfinite().all())
run("cuda")
"""
FORK = """
child = os.fork()
if child == 0:
    assert cache_info().size == 0
    torch.set_num_threads(1)
    q = torch.randn(2, 4, 256, 64)
    out = torch.ops.cudnn_flex.attention(q, q, q, [], [], [], PROGRAM, 0.125, False, False, [], [], "")[0]
    assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, q, q), atol=1e-5)
    print("the child is done", flush=True)
    os._exit(0)  # as multiprocessing's children end: plans of the parent are not the child's to free
status = os.waitpid(child, 0)[1]
run("cuda")
print("status", status)
"""


def run_script(source):
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for spew in ("leaked", "Traceback", "terminate called", "CUDA error"):
        assert spew not in done.stderr, done.stderr[:2000]
    return done.stdout


def test_the_interpreter_ends_in_silence_with_plans_alive():
    assert run_script(MODEL + "print('done')") == "done\n"


def test_a_fork_after_cuda_was_used():
    """The child, where neither CUDA nor Dynamo works, has none of the plans. The op works; both end in silence."""
    assert run_script(MODEL + f"PROGRAM = {text(ir.program())!r}" + FORK) == "the child is done\nstatus 0\n"
