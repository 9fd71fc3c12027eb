"""Every way to launch a graph writes the same bits, handles are used again, and graphs go with their plans.

    python3 -m pytest -s tests/gpu/test_launch_paths.py    also prints what each way takes the host
"""

import gc
import threading
import time
import weakref

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import cache_clear
from cudnn_flex_compile.bench.mods import causal, softcap
from cudnn_flex_compile.engine import frontend
from cudnn_flex_compile.engine.launch import handles
from cudnn_flex_compile.engine.plans import graph_plan
from tests.gpu.test_behaviour import assert_right, compiled, draw, fresh  # noqa: F401
from tests.gpu.test_numerics import poison

CALLS = 200
WAYS = {
    "prepared": frontend.prepared_launch, "raw": frontend.raw_launch, "public": frontend.public_launch,
    "by a mapping": lambda graph, uids: frontend.public_launch(Mapped(graph), uids),
}  # fmt: skip


class Mapped:
    """A graph of a frontend whose `execute` takes no uids."""

    def __init__(self, graph):
        self.graph = graph

    def execute(self, buffers, workspace, handle):
        self.graph.execute(buffers, workspace, handle=handle)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_all_ways_write_the_same_bits(fresh, monkeypatch, training):  # noqa: F811
    qkv = [draw(requires_grad=training) for _ in range(3)]
    results = {}
    for name, way in WAYS.items():
        with monkeypatch.context() as patch:
            patch.setattr(graph_plan, "launcher", way)
            if name == "prepared" and not hasattr(frontend.Graph, "_prepare_backend_execution"):
                continue
            torch.compiler.reset()
            cache_clear()
            poison()
            function = compiled(lambda q, k, v: flex_attention(q, k, v, softcap(2.0)), lower="always", replay=False)
            out = function(*qkv)
            gradients = torch.autograd.grad(out.float().square().sum(), qkv) if training else ()
            results[name] = (out.detach(), *gradients)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                function(*qkv)
            print(f"{name}: {(time.perf_counter() - start) / CALLS * 1e6:.1f} us a call")
    assert {"raw", "public", "by a mapping"} <= results.keys()
    first = results["raw"]
    for name, found in results.items():
        for one, other in zip(found[:1] if training else found, first, strict=False):  # dQ is added up in any order
            assert torch.equal(one, other), name
    assert_right(first[0], qkv, softcap(2.0))


def test_threads_that_follow_each_other_use_one_handle(fresh):  # noqa: F811
    qkv = [draw(requires_grad=False) for _ in range(3)]
    function = compiled(lambda q, k, v: flex_attention(q, k, v, softcap(2.0)), lower="always", replay=False)
    function(*qkv)
    used = []

    def run():
        poison()
        out = function(*qkv)
        torch.cuda.current_stream().synchronize()
        used.append((handles._local.held[0][0], out))

    for _ in range(5):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert len({id(handle) for handle, _ in used}) == 1
    for _, out in used:
        assert_right(out, qkv, softcap(2.0))


def test_graphs_go_with_their_plans(fresh, monkeypatch):  # noqa: F811
    """Nothing of the frontend leads back to a graph whose score_mod it called."""
    found, assemble = [], graph_plan.assemble

    def recorded(*given, **more):
        built = assemble(*given, **more)
        found.append(weakref.ref(built.graph))
        return built

    monkeypatch.setattr(graph_plan, "assemble", recorded)
    qkv = [draw(requires_grad=True) for _ in range(3)]
    out = compiled(lambda q, k, v: flex_attention(q, k, v, softcap(3.0)), lower="always")(*qkv)
    torch.autograd.grad(out.float().square().sum(), qkv)
    assert found
    del out
    torch.compiler.reset()
    cache_clear()
    gc.collect()
    assert all(graph() is None for graph in found)


def test_a_causal_mask_needs_no_link(fresh):  # noqa: F811
    """A graph without callbacks is lowered as ever."""
    qkv = [draw(requires_grad=False) for _ in range(3)]
    mask = create_block_mask(causal, None, None, 256, 256, device="cuda")
    out = compiled(lambda q, k, v: flex_attention(q, k, v, None, mask), lower="always")(*qkv)
    assert_right(out, qkv, None, causal)
