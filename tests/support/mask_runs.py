"""Masks whose rows are runs of keys, few and many, with what they capture; the rows that a table of endpoints shows.

Knows nothing of how tables are made.
"""

import functools

import torch

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
    "causal in another order": "order[b, q] >= order[b, kv]",
    "window in another order": "(places[q // 8 * 8 + q % 8] >= places[kv]) & (places[q] - places[kv] <= 9)",
    "documents in another order": "ids[b, order[b, q]] == ids[b, order[b, kv]]",
    "causal documents in another order":
        "(ids[b, order[b, q]] == ids[b, order[b, kv]]) & (order[b, q] >= order[b, kv])",
    "scalar": "(ids[b, q] == ids[b, kv]) & (q - kv <= n) & (q >= kv)",
}  # fmt: skip


# As the stages of the kernels may get them wrong: empty rows and tiles, one pair, all but one, runs about the edges.
EDGES = {
    "one pair": "(q == 5) & (kv == 7)",
    "all but one pair": "(q != 5) | (kv != 7)",
    "one row": "q == 3",
    "one column": "kv == 3",
    "no first rows": "(q >= 9) & (kv < q)",
    "from a tile's edge": "kv >= 8",
    "from behind a tile's edge": "kv >= 9",
    "to a tile's edge": "kv < 8",
    "to before a tile's edge": "kv < 7",
    "beyond the end": "kv < q + 100",
    "before the start": "kv < q - 100",
    "between two edges": "(kv >= 7) & (kv <= 8)",
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
    order = torch.stack([_order(draw, kind, length) for _ in range(batch)])
    starts = draw(0, length, (length + 2,)).sort().values
    return {
        "ids": ids, "row": ids[0].to(torch.int32), "starts": starts, "prefix": draw(0, length + 1, (batch,)),
        "padding": draw(0, 2, (batch, length)).bool(), "order": order, "places": order[-1].to(torch.int32),
        "n": int(draw(0, length, (1,))),
    }  # fmt: skip


def _order(draw, kind, length, block=8):
    """An order of keys: of blocks in any order, or, for kind 0, where keys may have the place of another one."""
    if kind == 0:
        return draw(0, length, (length,))
    whole = torch.arange(length // block * block).view(-1, block)
    return torch.cat((whole[draw(0, 2**20, (len(whole),)).argsort()].flatten(), torch.arange(whole.numel(), length)))


def shown(table, sizes):
    """[B, H or 1, Sq, Skv], from the definition."""
    batch, _, rows, columns = sizes
    ends = table.view(table.shape[0], table.shape[1], batch, rows).permute(2, 0, 3, 1)
    starts = torch.cat((torch.zeros_like(ends[..., :1]), ends[..., 1::2]), -1)
    kv = torch.arange(columns).view(-1, 1)
    inside = (starts.unsqueeze(-2) <= kv) & (kv < ends[..., 0::2].unsqueeze(-2))
    return inside.any(-1)
