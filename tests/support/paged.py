"""Masks that PyTorch's paged attention and its tests make: conditions of a page table, alone and in conjunctions.

Knows nothing of the package under test.
"""

import torch

from tests.support.gym import masked, scored

PAGE = 64
NINF = -float("inf")


def cases(length, device):
    """By name: calls of a length, whose functions capture tensors on `device`."""
    rows = torch.arange(length, device=device, dtype=torch.int32)
    ids, lengths = (
        (rows >= length // 2).int(),
        torch.tensor([length // 3, length // 2], device=device, dtype=torch.int32),
    )
    flags, valid = ids.bool(), rows % 5 > 0
    padding = torch.stack([rows < length // 2, rows % 3 > 0])
    pages = -(-length // PAGE)
    table = torch.arange(pages, device=device).flip(0)
    table[0] = -1  # a page that is free

    def at(kv):
        page = table[kv // PAGE]
        return torch.where(page >= 0, page * PAGE + kv % PAGE, -1)

    def prefixes(b, h, q, kv):
        return ((q <= lengths[b]) & (kv <= lengths[b])) | (q >= kv)

    return {
        "ids, score_mod": scored(lambda s, b, h, i, j: torch.where(ids[i] == ids[j], s, NINF), length),
        "bool ids, score_mod": scored(lambda s, b, h, i, j: torch.where(flags[i] == flags[j], s, NINF), length),
        "ids": masked(lambda b, h, i, j: ids[i] == ids[j], length),
        "bool ids": masked(lambda b, h, i, j: flags[i] == flags[j], length),
        "page, score_mod": scored(lambda s, b, h, i, j: torch.where(i >= at(j), s, NINF), length),
        "page": masked(lambda b, h, i, j: i >= at(j), length),
        "live page, score_mod": scored(
            lambda s, b, h, i, j: torch.where(at(j) >= 0, torch.where(i >= at(j), s, NINF), NINF), length),
        "live page": masked(lambda b, h, i, j: (at(j) >= 0) & (i >= at(j)), length),
        "live page before": masked(lambda b, h, i, j: (at(j) >= 0) & (i <= at(j)), length),
        "live page, causal": masked(lambda b, h, i, j: valid[j] & (i >= at(j)) & (i >= j), length),
        "padding and page": masked(lambda b, h, i, j: padding[b, j] & (i >= at(j)), length, per_head=True),
        "causal or both in a prefix, score_mod": scored(
            lambda s, b, h, i, j: torch.where(prefixes(b, h, i, j), s, NINF), length),
        "causal or both in a prefix": masked(prefixes, length, per_head=True),
    }  # fmt: skip


NAMES = tuple(cases(2 * PAGE, "cpu"))
