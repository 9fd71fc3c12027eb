"""What a process group of two shows, one function a case: on the CPU with gloo, on GPUs with nccl.

    torchrun --nproc-per-node 2 -m tests.distributed.cases --device cuda [case ...]

Numbers: no gradient is further off float64's than twice stock precision's. The first rank prints a line for each case.
"""

import argparse
import contextlib
import copy
import datetime
import functools
import itertools
import os
import sys
import traceback
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo import config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.experimental import local_map
from torch.distributed.tensor.experimental._attention import (
    _context_parallel_shard,
    _ContextParallel,
    _HeadTailLoadBalancer,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.attention import flex_attention as stock
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.parallel import DistributedDataParallel

from cudnn_flex_compile import install
from cudnn_flex_compile.backend import cudnn_flex
from cudnn_flex_compile.bench.mods import causal, softcap
from cudnn_flex_compile.kernels import block_mask
from cudnn_flex_compile.report.report import collect
from tests.support import layers

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
RANKS = 2
SIZES = {"cpu": (64, 16), "cuda": (256, 64)}  # length, head dim
OPTIONS = {"inner_backend": "aot_eager", "lower": "always"}
LEAST_BUCKET = 2**20  # bytes of DDP's first bucket
KINDS_OF_OPS = {
    "any": (), "copies": ("aten::copy_", "aten::clone", "aten::contiguous"),
    "waiting": ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero"),
}  # fmt: skip
SLACK = 1e-3  # of the norm: sums over ranks are rounded


def backend(graphs, graph_module, example_inputs):
    graphs.append(graph_module)
    return cudnn_flex(graph_module, example_inputs, options=OPTIONS)


class Block(nn.Module):
    """Attention and an MLP of more than DDP's smallest bucket each.

    It is no nn.Sequential: torch 2.14 would trace FSDP's hooks of one, too, and break the graph there.
    """

    def __init__(self, attention, width, **made):
        super().__init__()
        inner = LEAST_BUCKET // width
        self.attention, self.out = attention, nn.Linear(inner, width, **made)
        self.hidden = nn.Linear(width, inner, **made)

    def forward(self, x):
        return x + self.out(nn.functional.gelu(self.hidden(self.attention(x))))


class Model(nn.Module):
    def __init__(self, device):
        super().__init__()
        length, dim = SIZES[device]
        width = layers.HEADS * dim
        attentions = layers.model(layers.KINDS, length, dim, device)
        self.layers = nn.ModuleList(Block(each, width, device=device, dtype=torch.bfloat16) for each in attentions)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def model(device):
    torch.manual_seed(0)
    return Model(device)


def batch(device):
    """The whole one, and the rank's own part of it."""
    length, dim = SIZES[device]
    torch.manual_seed(1)
    whole = layers.inputs(length, dim, device, batch=RANKS)
    return whole, whole[dist.get_rank()].unsqueeze(0)


def step(function, *given):
    function(*given).float().square().mean().backward()


def gradients(module):
    found = {name.removeprefix("module."): p.grad for name, p in module.named_parameters()}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def by_one_process(module, x, *rest):
    """Gradients in float64 and in stock precision, by eager flex_attention."""
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        own = copy.deepcopy(module).to(dtype)
        with uncompiled():
            step(own, x.to(dtype), *rest)
        found.append(gradients(own))
    return found


@contextlib.contextmanager
def uncompiled():
    """Eager flex_attention without a compiler of its own, which would refuse float64."""
    before = stock._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    stock._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        yield
    finally:
        stock._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before


def assert_close(found, exact, stock_precision, what):
    error, allowed = (found - exact).norm(), 2 * (stock_precision - exact).norm() + SLACK * exact.norm()
    assert bool(error <= allowed), f"{what}: off by {error / exact.norm():.2e}, allowed {allowed / exact.norm():.2e}"


def train_alike(function, module, x, expected, calls, gradients=gradients):
    """A step of the compiled module gives the gradients of one process on the whole batch, all calls lowered."""
    with collect() as report:
        step(function, x)
    report.assert_all_lowered()
    assert len(report.lowered) == calls, report.summary
    exact, rounded = expected
    found = gradients(module)
    assert found.keys() == exact.keys()
    for name, gradient in found.items():
        assert_close(gradient, exact[name], rounded[name], name)


def ddp(device, optimize=True):
    """DDP, whose optimizer gives the backend one graph for each of its buckets."""
    module, (whole, mine) = model(device), batch(device)
    expected, graphs = by_one_process(module, whole), []
    wrapped = DistributedDataParallel(module, bucket_cap_mb=1)
    with config.patch(optimize_ddp=optimize):
        compiled = torch.compile(wrapped, backend=functools.partial(backend, graphs))
        train_alike(compiled, wrapped, mine, expected, len(layers.KINDS))
    assert len(graphs) >= len(layers.KINDS) if optimize else len(graphs) == 1, len(graphs)


def ddp_in_one_graph(device):
    ddp(device, optimize=False)


def ddp_adds_no_work(device):
    """Steps of the split graph take as many more ops than those of the whole one as with stock flex_attention, and wait
    for the device no more often; none compares a BlockMask again.
    """
    (_, mine), found = batch(device), {}
    for ours, split in itertools.product((True, False), (True, False)):
        torch._dynamo.reset()
        wrapped = DistributedDataParallel(model(device), bucket_cap_mb=1)
        graphs = []
        own = functools.partial(backend, graphs) if ours else "aot_eager"
        with config.patch(optimize_ddp=split):
            compiled = torch.compile(wrapped, backend=own)
            for _ in range(2):  # DDP fills its buckets anew after the first
                step(compiled, mine)
            with patch.object(block_mask, "_agree", side_effect=AssertionError("a BlockMask is compared again")):
                found[ours, split] = ops_of(functools.partial(step, compiled, mine))
        assert not ours or (len(graphs) > 1) == split, len(graphs)
    for kind in KINDS_OF_OPS:
        more = {ours: found[ours, True][kind] - found[ours, False][kind] for ours in (True, False)}
        assert more[True] <= more[False], f"{kind}: {found}"
    assert found[True, True]["waiting"] == 0, found


def ops_of(run):
    """How many ops run, how many of them copy, and how many wait for the device."""
    with torch.profiler.profile() as profile:
        run()
    names = [event.name for event in profile.events() if event.name.startswith("aten::")]
    return {kind: sum(name in of if of else True for name in names) for kind, of in KINDS_OF_OPS.items()}


def fsdp2(device, regional=True):
    """Fully sharded layers, compiled one by one, as regional compilation does."""
    module, (whole, mine) = model(device), batch(device)
    expected, graphs = by_one_process(module, whole), []
    mesh = init_device_mesh(device, (RANKS,))
    own = functools.partial(backend, graphs)
    for layer in module.layers:
        if regional:
            layer.compile(backend=own)
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    train_alike(module if regional else torch.compile(module, backend=own), module, mine, expected, len(layers.KINDS))


def fsdp2_as_a_whole(device):
    fsdp2(device, regional=False)


def fsdp2_installed(device):
    """Each block compiled by Inductor, with fullgraph=True, as torchtitan does, under install()."""
    module, (whole, mine) = model(device), batch(device)
    expected = by_one_process(module, whole)
    mesh = init_device_mesh(device, (RANKS,))
    for layer in module.layers:
        layer.compile(fullgraph=True)
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    with install(lower="always"):
        train_alike(module, module, mine, expected, len(layers.KINDS))


def ddp_installed(device):
    """flex_attention compiled alone, in an eager model, under install()."""
    module, (whole, mine) = model(device), batch(device)
    expected = by_one_process(module, whole)
    wrapped = DistributedDataParallel(module, bucket_cap_mb=1)
    alone = torch.compile(flex_attention)
    with patch.object(layers, "flex_attention", alone), install(lower="always"):
        train_alike(wrapped, wrapped, mine, expected, len(layers.KINDS))


class Heads(nn.Module):
    """Attention whose projections may be sharded: queries, keys and values are plain tensors of the rank's heads."""

    def __init__(self, device, dim, length, mod):
        super().__init__()
        width = layers.HEADS * dim
        made = {"bias": False, "device": device, "dtype": torch.bfloat16}
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, **made) for _ in range(4))
        self.mask = create_block_mask(causal, None, None, length, length, device=device)
        self.dim, self.mod = dim, mod

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.out(flex_attention(q, k, v, self.mod, self.mask).transpose(1, 2).flatten(2))


def tensor_parallel(device):
    length, dim = SIZES[device]
    torch.manual_seed(0)
    module, (whole, _) = Heads(device, dim, length, softcap(5.0)), batch(device)
    expected = by_one_process(module, whole)
    plan = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "out": RowwiseParallel()}
    parallelize_module(module, init_device_mesh(device, (RANKS,)), plan)
    compiled = torch.compile(module, backend=functools.partial(backend, []))
    train_alike(compiled, module, whole, expected, calls=1)


class Attend(nn.Module):
    """Attention alone, as torch's context parallel takes it: it gathers the keys and values of all ranks."""

    def forward(self, q, k, v, block_mask):
        return flex_attention(q, k, v, block_mask=block_mask)


class Sequences(nn.Module):
    """Two layers of attention over a rank's part of the sequence, with one BlockMask."""

    def __init__(self, device, dim):
        super().__init__()
        width = layers.HEADS * dim
        made = {"bias": False, "device": device, "dtype": torch.bfloat16}
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width, **made) for _ in range(2))
        self.attend, self.dim = nn.ModuleList(Attend() for _ in range(2)), dim

    def forward(self, x, mask):
        for qkv, attend in zip(self.qkv, self.attend, strict=True):
            q, k, v = qkv(x).unflatten(-1, (3, -1, self.dim)).permute(2, 0, 3, 1, 4)
            x = x + attend(q, k, v, mask).transpose(1, 2).flatten(2)
        return x


def context_parallel(device, balanced=False, installed=False):
    """The sequence split over ranks: BlockMasks of a rank's queries and all keys, by torch, with documents."""
    (_, dim), length = SIZES[device], 256 * RANKS
    mesh = init_device_mesh(device, (RANKS,))
    torch.manual_seed(0)
    ids = torch.arange(length, device=device) // 300
    mask = create_block_mask(lambda b, h, q, kv: (q >= kv) & (ids[q] == ids[kv]), 1, 1, length, length, device=device)
    module, x = Sequences(device, dim), layers.inputs(length, dim, device, batch=2)
    expected = by_one_process(module, x, mask)
    over_ranks = _ContextParallel(seq_dim=2, attention_type=_ContextParallel.AttentionType.FLEX)
    parallelize_module(module, mesh, {"attend.*": over_ranks})
    balancer = _HeadTailLoadBalancer(length, RANKS, device) if balanced else None
    with torch.compiler.set_stance("force_eager"):  # it would compile create_block_mask
        x, mask = _context_parallel_shard(mesh, [x, mask], [1, 0], balancer)
    compiled = module if installed else torch.compile(module, backend=functools.partial(backend, []))
    with contextlib.ExitStack() as stack:
        if installed:  # flex_attention compiled alone, once for both layers
            stack.enter_context(patch.object(sys.modules[__name__], "flex_attention", torch.compile(flex_attention)))
            stack.enter_context(install(lower="always"))
        train_alike(lambda x: compiled(x, mask), module, x, expected, 1 if installed else 2, mean_gradients)


def mean_gradients(module):
    found = gradients(module)
    for gradient in found.values():
        dist.all_reduce(gradient)
        gradient /= RANKS
    return found


def context_parallel_balanced(device):
    context_parallel(device, balanced=True)


def context_parallel_installed(device):
    context_parallel(device, balanced=True, installed=True)



def qkv(device, heads=4, kv_heads=4, batch=2):
    length, dim = SIZES[device]
    torch.manual_seed(2)
    draw = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
    return [draw(batch, h, length, dim) for h in (heads, kv_heads, kv_heads)]


def dtensor_by_local_map(device):
    """flex_attention of a rank's part of DTensors, inside of a compiled function."""
    given, mod = qkv(device), softcap(2.0)
    mesh = init_device_mesh(device, (RANKS,))
    attend = functools.partial(flex_attention, score_mod=mod)
    found = []
    for placement in (Shard(0), Shard(1)):
        torch._dynamo.reset()
        local = local_map(attend, [placement], ([placement],) * 3, device_mesh=mesh)
        leaves = [distribute_tensor(t, mesh, [placement]).requires_grad_() for t in given]
        with collect() as report:
            out = torch.compile(local, backend=functools.partial(backend, []))(*leaves)
        report.assert_all_lowered()
        assert len(report.lowered) == 1
        assert out.placements == (placement,)
        out.square().sum().backward()
        found.append([t.full_tensor() for t in (out.detach(), *(t.grad for t in leaves))])
    torch._dynamo.reset()
    plain = [t.clone().requires_grad_() for t in given]
    out = torch.compile(attend, backend=functools.partial(backend, []))(*plain)
    out.square().sum().backward()
    for sharded in found:
        for f, e in zip(sharded, (out.detach(), *(t.grad for t in plain)), strict=True):
            assert (f - e).norm() <= 1e-2 * e.norm()


def alibi_of_all_heads(device):
    """A slope for each head, as a DTensor among the operands' sources, under local_map with the heads sharded."""
    given, mesh = qkv(device), init_device_mesh(device, (RANKS,))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device)

    def attend(q, k, v, s):
        return flex_attention(q, k, v, lambda score, b, h, i, j: score - s[h] * (i - j))

    local = local_map(attend, [Shard(1)], (*([Shard(1)],) * 3, [Shard(0)]), device_mesh=mesh)
    shards = [*(distribute_tensor(t, mesh, [Shard(1)]) for t in given), distribute_tensor(slopes, mesh, [Shard(0)])]
    with collect() as report:
        out = torch.compile(local, backend=functools.partial(backend, []))(*shards)
    report.assert_all_lowered()
    with uncompiled():
        exact = flex_attention(*(t.double() for t in given), alibi_with(slopes))
        rounded = flex_attention(*given, alibi_with(slopes))
    assert_close(out.full_tensor(), exact, rounded, "out")


def alibi_with(slopes):
    return lambda score, b, h, q, kv: score - slopes[h] * (q - kv)


def example(device):
    """examples/distributed.py: each way of it has the losses of one process."""
    import distributed

    length, dim = SIZES[device]
    sizes = f"--steps 3 --layers 4 --heads 4 --batch 4 --dim {4 * dim} --length {length}".split()
    losses = {}
    with patch.dict(os.environ, CUDNN_FLEX_INNER_BACKEND="aot_eager", CUDNN_FLEX_LOWER="always"):
        for way in distributed.PARALLEL:
            torch._dynamo.reset()
            with patch.object(sys, "argv", ["distributed.py", "--parallel", way, *sizes]), collect() as report:
                args = distributed.parse()
                losses[way] = distributed.over_ranks(itertools.islice(distributed.steps(args, device), args.steps))
            report.assert_all_lowered()
            assert len(report.lowered) == 4, (way, report.summary)
    for way, found in losses.items():
        assert all(abs(f - e) <= 2e-3 * e for f, e in zip(found, losses["none"], strict=True)), (way, losses)


@patch("context_parallel.LENGTH", 512)  # also on GPUs, for eager flex_attention has all scores in memory
def context_parallel_example(device):
    """examples/context_parallel.py: each way has the losses of a whole sequence in one process."""
    import context_parallel as example

    found, steps = {}, 3
    for way, balance in (("backend", True), ("install", False)):
        torch._dynamo.reset()
        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.object(example, "OPTIONS", OPTIONS))
            stack.enter_context(install(lower="always"))
            report = stack.enter_context(collect())
            found[way] = list(itertools.islice(example.train(way, balance), steps))
        report.assert_all_lowered()
        assert len(report.lowered) == {"backend": example.LAYERS, "install": 1}[way], report.summary
    torch.manual_seed(0)
    whole, given = example.Model().to(device, torch.bfloat16), example.batch()
    optimizer, expected = torch.optim.AdamW(whole.parameters(), lr=1e-3), []
    for _ in range(steps):
        with uncompiled():
            expected.append(whole(*given))
        expected[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    for way, losses in found.items():
        assert all(abs(f - e) <= 2e-3 * e for f, e in zip(losses, expected, strict=True)), (way, losses, expected)


CASES = {case.__name__: case for case in (
    ddp, ddp_in_one_graph, ddp_adds_no_work, fsdp2, fsdp2_as_a_whole, fsdp2_installed, ddp_installed,
    tensor_parallel, dtensor_by_local_map, alibi_of_all_heads, context_parallel, context_parallel_balanced,
    context_parallel_installed, example, context_parallel_example,
)}  # fmt: skip


def verdict(name, device):
    """ "ok", or what went wrong on any rank."""
    torch._dynamo.reset()
    try:
        CASES[name](device)
        mine = ""
    except Exception as error:
        traceback.print_exc()
        mine = f"rank {dist.get_rank()}: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    every = [None] * RANKS
    dist.all_gather_object(every, mine)
    return "; ".join(filter(None, every)) or "ok"


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("cases", nargs="*")
    given = parser.parse_args()
    if given.device == "cpu":
        stock._validate_device = lambda *_: None  # as tests/conftest.py's trainable
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo" if given.device == "cpu" else "nccl", timeout=limit)
    verdicts = []
    for name in given.cases or CASES:
        verdicts.append(verdict(name, given.device))
        if dist.get_rank() == 0:
            print(f"case {name}: {verdicts[-1]}", flush=True)
    dist.destroy_process_group()
    return int(any(v != "ok" for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
