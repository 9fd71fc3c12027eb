"""What certification draws for the captured integers of a call: indices in range, lengths of any size.

Knows nothing of plans: no GPU is needed to draw.
"""

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile.passes import contenders
from cudnn_flex_compile.passes.decide import candidate
from tests.compile.test_backend import fresh, qkv, run

__all__ = ["fresh"]


def test_indices_stay_in_range_and_lengths_do_not(monkeypatch):
    lengths, kinds, table = torch.tensor([150, 90]), torch.randint(0, 3, (160,)), torch.randn(4, 3)
    mask = create_block_mask(lambda b, h, q, kv: kv < lengths[b], 2, None, 160, 160, device="cpu")
    seen = []

    def judge(found):
        seen.append({c.spec.shape: c.limit for c in candidate._reference(found).captured if c.spec is not None})
        return real(found)

    real = contenders.plan_or_reason
    monkeypatch.setattr(contenders, "plan_or_reason", judge)
    _, calls = run(lambda q, k, v: flex_attention(q, k, v, lambda s, b, h, i, j: s + table[h, kinds[i]], mask), *qkv())
    assert calls[0].reason is None, str(calls[0].reason)
    assert seen[0][lengths.shape] == 160
    assert seen[0][kinds.shape] == 1  # the smallest captured dimension is two


def test_an_index_stays_in_range_where_simplification_leaves_no_trace_of_it(monkeypatch):
    kinds, starts = torch.randint(0, 4, (160,)), torch.arange(4)
    seen = []

    def judge(found):
        reference = candidate._reference(found)
        seen.append({c.spec.shape: c.index for c in reference.captured if c.spec is not None})
        return real(found)

    real = contenders.plan_or_reason
    monkeypatch.setattr(contenders, "plan_or_reason", judge)

    def score_mod(s, b, h, i, j):  # always true
        return torch.where(torch.where(j >= starts[kinds[i]], 150, 1) > 0, s, -float("inf"))

    _, calls = run(lambda q, k, v: flex_attention(q, k, v, score_mod), *qkv())
    assert calls[0].reason is None, str(calls[0].reason)
    assert seen[0] == {kinds.shape: True, starts.shape: False}
