"""Layouts of packed documents, and masks of them in several spellings.

Knows nothing of attention. A layout is ids [B, S], int64 on the CPU, of a kind by its number.
"""

import torch

KINDS = ("ascending", "contiguous, ids in no order", "ids that come back", "in no order at all", "a padded tail")


def layout(number, batch, length, most=512):
    """1 to `most` documents of 1 key and more. The padding's id is -1."""
    generator = torch.Generator().manual_seed(number)
    count = int(torch.randint(1, min(most, length) + 1, (1,), generator=generator))
    runs = torch.stack([runs_of(count, length, generator) for _ in range(batch)])
    kind = KINDS[number % len(KINDS)]
    if kind == "ascending":
        return runs
    if kind == "in no order at all":
        return torch.randint(0, count, (batch, length), generator=generator)
    if kind == "a padded tail":
        ends = torch.randint(0, length + 1, (batch, 1), generator=generator)
        return torch.where(torch.arange(length) < ends, runs, -1)
    names = torch.stack([torch.randperm(count, generator=generator) for _ in range(batch)])
    if kind == "ids that come back":
        names = names // 2  # each id has two runs, mostly apart
    return names.gather(1, runs)


def runs_of(count, length, generator):
    """[S]: so many contiguous documents, from id 0 on."""
    starts = torch.zeros(length, dtype=torch.int64)
    starts[1 + torch.randperm(length - 1, generator=generator)[: count - 1]] = 1
    return starts.cumsum(0)


def causal_documents(ids):
    return lambda b, h, q, kv: (ids[b, q] == ids[b, kv]) & (q >= kv)


def padded_documents(ids):
    """What is padding sees nothing, and is not seen."""
    return lambda b, h, q, kv: (ids[b, q] == ids[b, kv]) & (q >= kv) & (ids[b, kv] >= 0)


def windowed_documents(ids):
    return lambda b, h, q, kv: (ids[b, kv] == ids[b, q]) & (q - kv < 100) & (kv <= q)


def whole_documents(ids):
    return lambda b, h, q, kv: ids[b, q] == ids[b, kv]


SPELLINGS = {
    "causal": causal_documents, "padded": padded_documents, "windowed": windowed_documents, "whole": whole_documents,
}  # fmt: skip
