"""What outlives a process: torch's cache artifacts with our graphs in them, and exported programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from cudnn_flex_compile import ops
from cudnn_flex_compile.bench.mods import softcap
from cudnn_flex_compile.report.report import collect

pytestmark = [pytest.mark.usefixtures("trainable"), pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[2]
# Trains one step, and prints what it computed and what Inductor's cache and that of AOTAutograd did.
STEP = """
import hashlib, json, sys, torch
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as module
from cudnn_flex_compile.report.report import collect
from cudnn_flex_compile.bench.mods import softcap

module._validate_device = lambda *_: None
action, path = sys.argv[1:]
if action == "load":
    torch.compiler.load_cache_artifacts(open(path, "rb").read())
torch.manual_seed(0)
qkv = [torch.randn(1, 96, 2, 16).bfloat16().transpose(1, 2).requires_grad_() for _ in range(3)]
cap = softcap(2.0)
with collect() as report:
    out = torch.compile(lambda q, k, v: module.flex_attention(q.sin(), k, v, cap).cos(), backend="cudnn_flex")(*qkv)
out.sum().backward()
if action == "save":
    open(path, "wb").write(torch.compiler.save_cache_artifacts()[0])
results = [t.detach().float().contiguous().numpy().tobytes() for t in (out, *(t.grad for t in qkv))]
print(json.dumps({
    "lowered": len(report.lowered), "results": hashlib.sha256(b"".join(results)).hexdigest(),
    "graphs": counters["inductor"]["fxgraph_cache_hit"], "missed graphs": counters["inductor"]["fxgraph_cache_miss"],
    "joint": counters["aot_autograd"]["autograd_cache_hit"],
}))
"""


def step(action, path, cache):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "CUDNN_FLEX_CACHE": "0"}
    command = [sys.executable, "-c", STEP, action, str(path)]
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_cache_artifacts_serve_another_process(tmp_path):
    saved = step("save", tmp_path / "artifacts", tmp_path / "first")
    assert (saved["lowered"], saved["graphs"], saved["missed graphs"], saved["joint"]) == (1, 0, 2, 0)
    loaded = step("load", tmp_path / "artifacts", tmp_path / "second")
    assert (loaded["lowered"], loaded["graphs"], loaded["missed graphs"], loaded["joint"]) == (1, 2, 0, 1)
    assert loaded["results"] == saved["results"]


class Capped(nn.Module):
    """Attention among other ops."""

    def forward(self, q, k, v):
        return flex_attention(q * 0.5, k, v, softcap(2.0)) + q


@torch.no_grad()
def test_an_exported_model_is_stock_flex_attention():
    """torch.export traces the model that was compiled, by no backend: the program needs nothing of ours to run."""
    args = tuple(torch.randn(2, 4, 96, 16).bfloat16() for _ in range(3))
    compiled = torch.compile(Capped(), backend="cudnn_flex", options={"inner_backend": "aot_eager"})
    with collect() as report:
        expected = compiled(*args)
        exported = torch.export.export(compiled, args)
    assert len(report.lowered) == len(report.calls) == 1
    targets = [node.target for node in exported.graph.nodes]
    assert targets.count(torch.ops.higher_order.flex_attention) == 1
    assert not any(str(target).startswith("cudnn_flex") for target in targets)
    assert ops.attention not in targets
    found = exported.module()(*args)
    assert (found.double() - expected.double()).abs().max() <= 2**-6 * max(1.0, float(expected.abs().max()))


@torch.no_grad()
def test_compiling_an_exported_program_ends_as_with_stock():
    """Some versions of torch cannot trace an exported flex_attention; the backend is not asked then."""
    args = tuple(torch.randn(2, 4, 96, 16).bfloat16() for _ in range(3))
    ends = []
    for backend in ("eager", "cudnn_flex"):
        torch._dynamo.reset()
        exported = torch.export.export(Capped(), args)
        try:
            torch.compile(exported.module(), backend=backend)(*args)
            ends.append(None)
        except Exception as error:
            ends.append((type(error).__name__, str(error).splitlines()[0]))
    assert ends[0] == ends[1]
