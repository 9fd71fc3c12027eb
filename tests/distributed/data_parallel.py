"""DDP and fully sharded data parallelism, by the backend and under install()."""

import functools
import itertools
from unittest.mock import patch

import torch
from torch._dynamo import config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.parallel import DistributedDataParallel

from cudnn_flex_compile import install
from cudnn_flex_compile.kernels import block_mask
from tests.distributed.training import (
    RANKS,
    backend,
    batch,
    by_one_process,
    model,
    step,
    train_alike,
)
from tests.support import layers

KINDS_OF_OPS = {
    "any": (), "copies": ("aten::copy_", "aten::clone", "aten::contiguous"),
    "waiting": ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero"),
}  # fmt: skip


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
