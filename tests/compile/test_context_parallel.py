"""Masks that torch's context parallel wrote for a rank: their bounds, or tile lists without a look at pairs.

tests/distributed/cases.py trains with it in two processes.
"""

import pytest
import torch
from torch.nn.attention import flex_attention as stock
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from cudnn_flex_compile.kernels import list_making, row_tables
from cudnn_flex_compile.passes.write import tile_lists as write_lists
from cudnn_flex_compile.report.report import collect
from cudnn_flex_compile.scoremod.text import infix
from tests.support.fastest import make_fastest
from tests.support.mask_runs import shown

parallel = pytest.importorskip("torch.distributed.tensor.experimental._context_parallel._attention")
balancers = pytest.importorskip("torch.distributed.tensor.experimental._context_parallel._load_balancer")

RANKS, LENGTH, BATCH, HEADS, DIM = 4, 2048, 2, 1, 8
DOCUMENTS = ([1024, 1024], [1024, 1024])
IDS = torch.arange(LENGTH) // 1024


class Mesh:
    """As the mesh of one rank, without other processes."""

    device_type = "cpu"

    def __init__(self, rank):
        self.rank = rank

    def get_local_rank(self):
        return self.rank

    def size(self):
        return RANKS


def causal(b, h, q, kv):
    return q >= kv


def window(b, h, q, kv):
    return (q >= kv) & (q - kv < 300)


def documents(b, h, q, kv):
    return IDS[q] == IDS[kv]


def causal_documents(b, h, q, kv):
    return (q >= kv) & (IDS[q] == IDS[kv])


def prefix(b, h, q, kv):
    return (q >= kv) | (kv < 200)


BALANCERS = {
    "head and tail": lambda mask: balancers._HeadTailLoadBalancer(LENGTH, RANKS, "cpu"),
    "of each document": lambda mask: balancers._PerDocumentHeadTailLoadBalancer([DOCUMENTS[0]], RANKS, "cpu"),
    "of each sequence's documents": lambda mask: balancers._PerDocumentHeadTailLoadBalancer(DOCUMENTS, RANKS, "cpu"),
    "by time": lambda mask: balancers._PTRRLoadBalancer(mask, RANKS),
}


def of_rank(rank, mask_mod, balancer, monkeypatch):
    """The rank's BlockMask, by torch."""
    batch = BATCH if balancer == "of each sequence's documents" else 1
    whole = create_block_mask(mask_mod, batch, 1, LENGTH, LENGTH, device="cpu")
    balanced = balancer is not None
    monkeypatch.setattr(parallel, "_compiled_create_block_mask", create_block_mask)
    monkeypatch.setattr(parallel._cp_options, "enable_load_balance", balanced)
    given = (mask_mod, batch, 1, LENGTH, LENGTH, Mesh(rank))
    return parallel._create_cp_block_mask(*given, BALANCERS[balancer](whole) if balanced else None)


def inputs():
    lengths = (LENGTH // RANKS, LENGTH, LENGTH)
    return [torch.randn(BATCH, HEADS, n, DIM, dtype=torch.bfloat16, requires_grad=True) for n in lengths]


def check(mask, monkeypatch):
    """The one call, lowered, whose output and gradients are those of eager flex_attention."""
    given = inputs()
    options = {"inner_backend": "aot_eager", "lower": "always", "tile_lists": True}
    compiled = torch.compile(lambda *qkv: flex_attention(*qkv, block_mask=mask), backend="cudnn_flex", options=options)
    with collect() as report:
        found = compiled(*given)
    report.assert_all_lowered()
    monkeypatch.setattr(stock, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # eagerly, without a compiler
    expected = flex_attention(*given, block_mask=mask)
    gradient = torch.randn_like(expected)
    for mine, eager in zip((found, *torch.autograd.grad(found, given, gradient)),
                           (expected, *torch.autograd.grad(expected, given, gradient)), strict=True):  # fmt: skip
        torch.testing.assert_close(mine, eager, rtol=0.02, atol=0.02)
    return report.lowered[0]


OFFSET = [
    (causal, "(q + {first}) >= kv"), (window, "((q + {first}) >= kv) & ((kv + -213) >= q)"),
    (prefix, "((q + {first}) >= kv) | (199 >= kv)"),
]  # fmt: skip


@pytest.mark.parametrize(("mask_mod", "expected"), OFFSET)
def test_a_ranks_offset_is_in_the_bounds(mask_mod, expected, trainable, monkeypatch):
    """So that tiles are skipped, as those of a mask without context parallel."""
    call, first = check(of_rank(1, mask_mod, None, monkeypatch), monkeypatch), LENGTH // RANKS
    assert infix(call.program.mask) == expected.format(first=first)


CASES = [("head and tail", mask_mod) for mask_mod in (causal, window, documents, causal_documents, prefix)]
CASES += [(balancer, mask_mod) for balancer in list(BALANCERS)[1:] for mask_mod in (causal_documents, prefix)]


@pytest.mark.parametrize(("balancer", "mask_mod"), CASES)
def test_balanced_ranks_have_tile_lists(balancer, mask_mod, trainable, monkeypatch):
    """As if there were kernels for the CPU; what the list shows is what torch's function says at every pair."""
    asked = []

    def most_endpoints(pairs, find=list_making.most_endpoints):
        asked.append((pairs, find(pairs)))
        return asked[-1][1]

    monkeypatch.setattr(write_lists, "unusable", lambda device: None)
    monkeypatch.setattr(list_making, "most_endpoints", most_endpoints)
    make_fastest(monkeypatch, "all", rest=8.0)
    mask = of_rank(1, mask_mod, balancer, monkeypatch)
    assert check(mask, monkeypatch).strategies == ("tile_lists",)
    ((pairs, most),) = asked
    assert not most.slowly
    table, numbers = row_tables.made(row_tables.BLOCKS, pairs, 1, row_tables.width_for(most.endpoints))
    count, right, well_formed = numbers.tolist()
    assert count <= most.endpoints
    assert right
    assert well_formed
    expected = create_mask(mask.mask_mod, pairs.axes[0], 1, LENGTH // RANKS, LENGTH, device="cpu")
    assert torch.equal(shown(table, (BATCH, 1, *expected.shape[2:])), expected.expand(BATCH, -1, -1, -1))
