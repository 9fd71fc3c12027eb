"""Plans that outlive their process: restored ones compute what built ones do, and no accident to the folder matters."""

import json
import os
import random
import signal
import subprocess
import sys
import threading

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from cudnn_flex_compile import cache_clear, cache_info
from cudnn_flex_compile.bench.mods import softcap
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.store.plan_cache import CachedPlan


def start(folder, *arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CUDNN_FLEX_")}
    environment["CUDNN_FLEX_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-m", "tests.measure.stored_calls", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process):
    out, _ = process.communicate(timeout=1200)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


def entries(folder):
    return sorted(folder.glob("*.plan"))


def test_processes(tmp_path):
    """The second one builds nothing; then entries are damaged, and then a process dies in a write."""
    first, second = finish(start(tmp_path)), finish(start(tmp_path))  # about 50 plans each
    print({k: first[k] for k in ("builds", "restored", "certifications", "kept", "seconds")})
    print({k: second[k] for k in ("builds", "restored", "certifications", "kept", "seconds")})
    assert first["builds"] > 0
    assert (second["builds"], second["certifications"]) == (0, 0)
    assert second["restored"] >= len(entries(tmp_path)) > 20
    assert second["outputs"] == first["outputs"], "the same kernels"
    assert list(second["kept"].values()) == list(first["kept"].values())
    draw, damaged = random.Random(0), entries(tmp_path)[::10]
    for path in damaged:
        data = path.read_bytes()
        at = draw.randrange(len(data))
        path.write_bytes(draw.choice([data[:at], data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]]))
    third = finish(start(tmp_path))
    assert third["outputs"] == first["outputs"]
    assert third["builds"] > 0
    assert second["restored"] - len(damaged) <= third["restored"] < second["restored"]
    for path in entries(tmp_path)[::2]:
        path.unlink()
    killed = start(tmp_path, "--die-at", 3)
    killed.communicate(timeout=1200)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.part"))) == 1
    assert finish(start(tmp_path))["outputs"] == first["outputs"]
    assert finish(start(tmp_path))["builds"] == 0


def test_four_processes_at_once_on_an_empty_folder(tmp_path):
    folder = tmp_path / "cache"
    results = [finish(p) for p in [start(folder, "--lengths", 256, "--start", 7 * i) for i in range(4)]]
    after = finish(start(folder, "--lengths", 256))
    assert after["builds"] == 0
    assert all(dict(sorted(r["outputs"].items())) == dict(sorted(after["outputs"].items())) for r in results)


@pytest.fixture
def restored(monkeypatch, tmp_path):
    """A function whose plans come from the folder, its inputs, and what it gave when they were built."""
    monkeypatch.setenv("CUDNN_FLEX_CACHE", "1")
    monkeypatch.setenv("CUDNN_FLEX_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    qkv = [torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def compiled():
        torch._dynamo.reset()
        cache_clear()
        mod = softcap(2.0)
        options = {"inner_backend": "aot_eager"}
        return torch.compile(lambda q, k, v: flex_attention(q, k, v, mod), backend="cudnn_flex", options=options)

    expected = compiled()(*qkv)
    assert cache_info().builds == 2
    function = compiled()
    assert torch.equal(function(*qkv), expected)
    assert (cache_info().builds, cache_info().restored) == (0, 2)
    return function, qkv, expected


def test_restored_plans_take_the_quick_way(restored):
    found = [ready.plan for ready in engine.plans.values() if isinstance(ready, CachedPlan)]
    assert [plan._launch.__name__ for plan in found] == ["launch"] * 2


def test_restored_plans_in_another_thread(restored):
    """Which has a handle of its own."""
    function, qkv, expected = restored
    got = []
    worker = threading.Thread(target=lambda: got.append(function(*qkv)))
    worker.start()
    worker.join()
    assert torch.equal(got[0], expected)


def test_restored_plans_in_a_cuda_graph(restored):
    function, qkv, expected = restored
    with torch.no_grad():
        function(*qkv)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = function(*qkv)
        captured.zero_()
        graph.replay()
    assert torch.equal(captured, expected)
