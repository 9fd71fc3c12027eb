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
    return started(cache, STEP, action, str(path))


def started(cache, script, *arguments):
    """What a process prints last, with this folder for Inductor's caches."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "CUDNN_FLEX_CACHE": "0"}
    command = [sys.executable, "-c", script, *arguments]
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_cache_artifacts_serve_another_process(tmp_path):
    saved = step("save", tmp_path / "artifacts", tmp_path / "first")
    assert (saved["lowered"], saved["graphs"], saved["missed graphs"], saved["joint"]) == (1, 0, 2, 0)
    loaded = step("load", tmp_path / "artifacts", tmp_path / "second")
    assert (loaded["lowered"], loaded["graphs"], loaded["missed graphs"], loaded["joint"]) == (1, 2, 0, 1)
    assert loaded["results"] == saved["results"]


# Trains a step of a call whose BlockMask is compared and one whose keys are permuted, by the backend and by install(),
# and calls a function that a GPU runs at each step. Prints how often each way found a graph, did not, or did not look.
WAYS = """
import json, torch
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as module
import cudnn_flex_compile
from cudnn_flex_compile.kernels import hot_function
from cudnn_flex_compile.report.report import collect

module._validate_device = lambda *_: None
hot_function._pays = lambda tensor: True
padding, options = torch.arange(96)[None] < 70, {"lower": "always"}
masks = [module.create_block_mask(mask, 1, 1, 96, 96, device="cpu") for mask in (
    lambda b, h, q, kv: q >= kv, lambda b, h, q, kv: padding[b, kv],
)]

def attend(q, k, v):
    for mask in masks:
        q = module.flex_attention(q, k, v, block_mask=mask)
    return q.cos()

def train(**compiled):
    qkv = [torch.randn(1, 2, 96, 16).bfloat16().requires_grad_() for _ in range(3)]
    with collect() as report:
        torch.compile(attend, **compiled)(*qkv).sum().backward()
    report.assert_all_lowered()
    assert len(report.lowered) == 2, report

def hot():
    total = hot_function.HotFunction(lambda a, b: (a > b).all())
    for _ in range(4):
        total(torch.ones(3), torch.zeros(3))

def installed():
    with cudnn_flex_compile.install(**options):
        train()

found = {}
for name, run in {"backend": lambda: train(backend="cudnn_flex", options=options), "install": installed,
                  "hot": hot}.items():
    torch._dynamo.reset()
    counters.clear()
    run()
    caches = {**counters["inductor"], **counters["aot_autograd"]}
    found[name] = {key: caches.get(key, 0) for cache in ("fxgraph_cache", "autograd_cache")
                   for key in (f"{cache}_hit", f"{cache}_miss", f"{cache}_bypass")}
print(json.dumps(found))
"""


def test_a_second_process_finds_every_graph_in_inductors_caches(tmp_path):
    first, second = (started(tmp_path / "cache", WAYS) for _ in range(2))
    assert sorted(first) == sorted(second) == ["backend", "hot", "install"]
    for name, graphs in (("backend", 2), ("install", 2), ("hot", 1)):  # forward and backward
        made, read = first[name], second[name]
        assert made["fxgraph_cache_miss"] + made["fxgraph_cache_hit"] == graphs, (name, made)
        expected = dict.fromkeys(read, 0) | {"fxgraph_cache_hit": graphs, "autograd_cache_hit": 1}
        assert read == expected, name
        assert not any(n for key, n in made.items() if key.endswith("bypass")), (name, made)


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
