"""Heads that are sharded over ranks: tensor parallelism, and flex_attention of a rank's part of DTensors."""

import functools

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.experimental import local_map
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile.bench.mods import causal, softcap
from cudnn_flex_compile.report.report import collect
from tests.distributed.training import (
    RANKS,
    SIZES,
    assert_close,
    backend,
    batch,
    by_one_process,
    train_alike,
)
from tests.support import layers
from tests.support.uncompiled import uncompiled


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
