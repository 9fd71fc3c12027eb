"""Endpoints of rows against brute force: documents in every order, and masks of few and of many intervals."""

import functools

import pytest
import torch

from cudnn_flex_compile.passes.write.operands import operand_value
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import visible_rows
from cudnn_flex_compile.scoremod.masks.intervals import NARROW, endpoints_of, every_endpoint
from cudnn_flex_compile.scoremod.partition import pairwise
from tests.support.mask_sources import CPU, brute_force, leaves, normal, used

SOURCES = {
    "causal documents": "(ids[b, q] == ids[b, kv]) & (q >= kv)",
    "documents": "ids[b, q] == ids[b, kv]",
    "documents under a window": "(ids[b, q] == ids[b, kv]) & (q >= kv) & (q - kv <= 5)",
    "one sequence of ids": "(row[q] == row[kv]) & (q >= kv)",
    "padding id": "(ids[b, q] == ids[b, kv]) & (q >= kv) & (ids[b, kv] != 0)",
    "offsets": "(starts[ids[b, q]] <= kv) & (kv <= q)",
    "prefix": "(q >= kv) | (kv < prefix[b])",
    "prefix of each document": "(ids[b, q] == ids[b, kv]) & ((q >= kv) | (kv < prefix[b]))",
    "image blocks": "(q >= kv) | ((row[q] == row[kv]) & (row[q] >= 2))",
    "padding": "padding[b, kv] & (q >= kv)",
    "per head": "(ids[b, q] == ids[b, kv]) & (q + 4 * h >= kv)",
    "sinks": "(ids[b, q] == ids[b, kv]) & (q >= kv) & ((q - kv <= 4) | (kv < 2))",
    "everything": "q >= 0",
    "nothing": "q < 0",
    "scalar": "(ids[b, q] == ids[b, kv]) & (q - kv <= n) & (q >= kv)",
}  # fmt: skip


def captured(seed, batch, length):
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randint, generator=generator)
    kind = seed % 4
    count = int(draw(1, length + 1, (1,)))
    ids = draw(0, count, (batch, length))  # kind 0: in no order, every key its own run
    if kind == 1:  # contiguous, ascending
        ids = ids.sort(-1).values
    elif kind == 2:  # contiguous, in no order, and ids that come back
        ids = draw(0, 3, (batch, count)).gather(1, ids.sort(-1).values)
    elif kind == 3:  # a tail of padding
        ids = torch.where(torch.arange(length) < draw(0, length + 1, (batch, 1)), ids.sort(-1).values + 1, 0)
    starts = draw(0, length, (length + 2,)).sort().values
    return {
        "ids": ids, "row": ids[0].to(torch.int32), "starts": starts, "prefix": draw(0, length + 1, (batch,)),
        "padding": draw(0, 2, (batch, length)).bool(), "n": int(draw(0, length, (1,))),
    }  # fmt: skip


def shown(table, sizes):
    """[B, H or 1, Sq, Skv], from the definition."""
    batch, _, rows, columns = sizes
    ends = table.view(table.shape[0], table.shape[1], batch, rows).permute(2, 0, 3, 1)
    starts = torch.cat((torch.zeros_like(ends[..., :1]), ends[..., 1::2]), -1)
    kv = torch.arange(columns).view(-1, 1)
    inside = (starts.unsqueeze(-2) <= kv) & (kv < ends[..., 0::2].unsqueeze(-2))
    return inside.any(-1)


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
@pytest.mark.parametrize("seed", range(12))
def test_endpoints_are_exact(source, seed):
    sizes = (2, 3, (1, 7, 24, 33)[seed % 4], (24, 33, 1, 40)[seed // 4 % 4])
    length = max(sizes[2:])
    given = used(source, captured(seed, 2, length))
    expected = brute_force(source, given, sizes)
    inside, hoisted = pairwise(normal(source, given))
    known = dict(zip(leaves(given), given.values(), strict=True))
    operands = [operand_value(part, known.__getitem__, sizes, CPU) for part in hoisted]
    ints = [value if isinstance(value, int) else 0 for value in given.values()]
    found = endpoints_of(inside.mask, operands, ints, [], sizes, CPU)
    most = int(found.most)
    changes = expected != torch.nn.functional.pad(expected[..., :-1], (1, 0), value=True)
    assert most == int(changes.sum(-1).max())
    if most <= NARROW:
        assert torch.equal(shown(found.table, sizes).expand(sizes), expected)
        assert (found.table.diff(dim=1) >= 0).all()
    heads = sizes[1] if "h" in ir.axes_of(inside.mask) else 1
    for width in (most, sizes[3] + 1):
        chunks = visible_rows(inside.mask, operands, ints, [], sizes, 5, CPU)
        table = every_endpoint(chunks, sizes, heads, width)
        assert table.shape == (heads, width | 1, sizes[0] * sizes[2])
        assert table.dtype == torch.int32
        assert torch.equal(shown(table, sizes).expand(sizes), expected)
        assert (table.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("source", ["(q >= kv) | (kv < 7)", "(q >= kv) != (kv < 7)", "(q >= kv) == (kv < 7)"])
def test_endpoints_are_compiled_by_inductor(source):
    """Which orders the bounds of what is compared: truth values have none."""
    sizes, mask = (1, 1, 24, 24), normal(source).mask
    torch._dynamo.reset()
    table = torch.compile(lambda: endpoints_of(mask, [], [], [], sizes, CPU).table, dynamic=False)()
    assert torch.equal(shown(table, sizes), brute_force(source, {}, sizes))


def test_pairwise_reads_operands_along_one_axis():
    given = used(SOURCES["offsets"], captured(1, 2, 8))
    _, hoisted = pairwise(normal(SOURCES["offsets"], given))
    assert [part.dims for part in hoisted] == ["bq"]
    given = {"bias": torch.ones(8, 8, dtype=torch.bool)}
    assert pairwise(normal("bias[q, kv] & (q >= kv)", given)) is None
