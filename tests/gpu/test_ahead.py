"""The first compile of a call by tile lists has its kernels compiled in processes; a second process compiles none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cudnn_flex_compile.engine.tiles.frontend import kernels_missing
from tests.gpu.test_documents import NINETY

pytestmark = pytest.mark.skipif(not NINETY or kernels_missing() is not None, reason="no kernels by tile lists here")

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, time, torch
from cutlass import cute
from torch.nn.attention.flex_attention import flex_attention
from cudnn_flex_compile.engine.tiles import ahead
from cudnn_flex_compile.report.report import collect

compiled, begun, real = [], ahead._begun, cute.compile

class Counting:
    def __call__(self, function, *given, **how):
        compiled.append(type(function).__name__)
        return real(function, *given, **how)
    def __getattr__(self, name):
        return getattr(real, name)

cute.compile = Counting()
near = lambda score, b, h, q, kv: torch.where((q >= kv) & (q - kv < 200), score, -float("inf"))
given = [torch.randn(2, 4, 1024, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
run = torch.compile(lambda q, k, v: flex_attention(q, k, v, near), backend="cudnn_flex",
                    options={"strategy": "tile_lists"})
start = time.monotonic()
with collect() as report:
    run(*given).sum().backward()
torch.cuda.synchronize()
work = list(begun.values())
print(json.dumps({
    "compiled": compiled, "seconds": time.monotonic() - start, "strategies": report.calls[0].strategies,
    "reason": str(report.calls[0].reason), "processes": [w.process and w.process.returncode for w in work],
}))
"""


def first_step(folder):
    """Runs a first step in a process, and gives what it printed."""
    given = {"CUDNN_FLEX_CACHE": "1", "CUDNN_FLEX_CACHE_DIR": str(folder)}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **given, "PYTHONPATH": path}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "FakeTensor" not in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(done.stdout.splitlines()) == 1, "what kernels are compiled is not printed"
    print(found)
    assert found["strategies"] == ["tile_lists", "tile_lists"], found
    return found


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 4, reason="too few cores for processes")
def test_processes_compile_once(tmp_path):
    cold, warm = first_step(tmp_path), first_step(tmp_path)
    assert cold["processes"] == [0, 0, 0, 0], cold
    assert cold["compiled"] == [], "the processes compiled all that was asked for"
    assert (warm["processes"], warm["compiled"]) == ([], [])
