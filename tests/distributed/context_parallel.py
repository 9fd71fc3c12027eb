"""torch's context parallel: each rank has a part of the queries, and all keys and values."""

import contextlib
import functools
import sys
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental._attention import (
    _context_parallel_shard,
    _ContextParallel,
    _HeadTailLoadBalancer,
)
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import install
from tests.distributed.training import (
    RANKS,
    SIZES,
    backend,
    by_one_process,
    gradients,
    train_alike,
)
from tests.support import layers


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
