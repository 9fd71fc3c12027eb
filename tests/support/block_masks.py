"""BlockMasks for the tests of the contract, and what compiled calls with them are compared with.

Knows nothing of the backend's decisions: each test says whether its call is lowered or kept.
"""

import pytest
import torch
import torch._dynamo.testing
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention, noop_mask

from cudnn_flex_compile.bench.mods import causal
from cudnn_flex_compile.report.report import collect
from tests.compile.test_backend import AOT, close, draw

LENGTHS, PREFIXES = torch.tensor([150, 40]), torch.tensor([[3, 70, 0, 130], [64, 0, 1, 20]])
IDS = torch.arange(640) // 90


def by_batch(b, h, q, kv):
    return kv < LENGTHS[b]


def by_head(b, h, q, kv):
    return (q >= kv) & (q - kv < 40 * (h + 1))


def by_both(b, h, q, kv):
    return (q >= kv) | (kv < PREFIXES[b, h])


def window(b, h, q, kv):
    return (q >= kv) & (q - kv < 70)


def by_document(b, h, q, kv):
    return IDS[q] == IDS[kv]


def visible_padding(b, h, q, kv):
    return kv >= 100


def nothing(b, h, q, kv):
    return q < 0


def created(mask_mod=causal, batch=None, heads=None, lengths=(160, 160), block=128):
    return create_block_mask(mask_mod, batch, heads, *lengths, "cpu", BLOCK_SIZE=block)


def listed(pattern):
    """Counts and indices of a [rows, columns] pattern, for one batch entry and head."""
    pattern = torch.tensor(pattern, dtype=torch.bool)[None, None]
    order = torch.argsort(~pattern, dim=-1, stable=True)
    return pattern.sum(-1).to(torch.int32), order.to(torch.int32)


def from_blocks(partial, full=None, mask_mod=None, lengths=(160, 160), block=128, **how):
    more = listed(full) if full is not None else (None, None)
    return BlockMask.from_kv_blocks(
        *listed(partial), *more, BLOCK_SIZE=block, mask_mod=mask_mod or noop_mask, seq_lengths=lengths, **how
    )


def inputs(mask, batch=2, heads=4, kv_heads=4):
    """Query, key and value of a BlockMask's lengths."""
    lengths = mask.seq_lengths
    return [draw(batch=batch, heads=n, length=s) for n, s in ((heads, lengths[0]), (kv_heads, lengths[1]),
                                                              (kv_heads, lengths[1]))]  # fmt: skip


def attend(query, key, value, mask, **how):
    return flex_attention(query, key, value, block_mask=mask, **how)


def honoured(query, key, value, mask):
    """The mask as stock kernels run it: nothing in omitted blocks, no mask_mod in full ones; in float64."""
    sizes = (*query.shape[:3], key.shape[2])
    where = [torch.arange(n).view([-1 if i == d else 1 for i in range(4)]) for d, n in enumerate(sizes)]
    pairs = mask.mask_mod(*where).expand(sizes)
    kinds = []
    for count, indices in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
        if count is None:
            kinds.append(torch.zeros((), dtype=torch.bool))
            continue
        used = torch.arange(indices.shape[-1]) < count.unsqueeze(-1)
        blocks = (torch.nn.functional.one_hot(indices.long(), 64) * used.unsqueeze(-1)).sum(-2) > 0
        rows, columns = (w // b for w, b in zip(where[2:], mask.BLOCK_SIZE, strict=True))
        kinds.append(blocks[:, :, rows.view(-1, 1), columns.view(-1)])
    visible = (pairs & kinds[0]) | kinds[1]
    scores = (query.double() @ key.double().transpose(2, 3)) / query.shape[-1] ** 0.5
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), -1).nan_to_num(0.0)
    return torch.empty_like(query).copy_(weights @ value.double())


def code_of(calls):
    """The one code of all calls, None if they were lowered."""
    assert calls
    codes = {c.reason.code if c.reason else None for c in calls}
    assert len(codes) == 1, [str(c.reason) for c in calls]
    return codes.pop()


def compiled(function, **how):
    return torch.compile(function, backend="cudnn_flex", options={**AOT, "lower": "always"}, **how)


def lowered_steps(function, steps, eager=None, **how):
    """Runs the compiled function on each step's arguments; the reports, if every result was that of eager."""
    with collect() as report:
        run = compiled(function, **how)
        for args in steps:
            close(run(*args), (eager or function)(*args))
    return report.calls


def compilations(function, steps, **how):
    """How often stock compiles for these steps."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    run = torch.compile(function, backend=counter, **how)
    for args in steps:
        run(*args)
    torch._dynamo.reset()
    return counter.frame_count


@pytest.fixture
def comparisons(monkeypatch):
    """One entry for each comparison of blocks with a mask program at run time."""
    from cudnn_flex_compile.kernels import block_mask_contract

    seen, compare = [], block_mask_contract._agree

    def counted(*args):
        seen.append(args)
        return compare(*args)

    monkeypatch.setattr(block_mask_contract, "_agree", counted)
    return seen
