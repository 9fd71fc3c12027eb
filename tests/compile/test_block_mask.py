"""BlockMasks of any making: lowered and right where the blocks say what the mask_mod says, kept where they do not.

Knows nothing of BlockMasks that change after compilation (test_block_mask_steps.py).
"""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, flex_attention, or_masks

from cudnn_flex_compile.bench.mods import causal
from cudnn_flex_compile.reasons import Code
from cudnn_flex_compile.report.report import collect
from tests.compile.test_backend import AOT, close, draw, fresh  # noqa: F401
from tests.support.block_masks import (
    attend,
    by_batch,
    by_both,
    by_document,
    by_head,
    code_of,
    compiled,
    created,
    from_blocks,
    honoured,
    inputs,
    listed,
    nothing,
    visible_padding,
    window,
)  # fmt: skip

KEPT = Code.BLOCK_MASK


def verdict(mask, function=attend, right=True, **how):
    """The code of the compiled call; a lowered one must be right by eager and by what stock kernels run."""
    args = inputs(mask, **how)
    with collect() as report:
        found = compiled(function)(*args, mask)
    code = code_of(report.calls)
    close(found, function(*args, mask))
    if code is None:
        close(found, honoured(*args, mask))
    return code


CREATED = {
    "causal": lambda: created(),
    "causal, blocks of 64 for each batch entry and head": lambda: created(causal, 2, 4, block=64),
    "causal, blocks of 128 x 64, fewer keys": lambda: created(causal, None, 4, (200, 77), (128, 64)),
    "causal, blocks of 256, fewer queries": lambda: created(causal, 2, None, (130, 300), 256),
    "causal, one query": lambda: created(causal, lengths=(1, 300)),
    "batch": lambda: created(by_batch, 2, None, block=64),
    "batch, heads alike": lambda: created(by_batch, 2, 4, (300, 130), 256),
    "head": lambda: created(by_head, None, 4, (200, 300), 64),
    "head, batch entries alike": lambda: created(by_head, 2, 4, (257, 257), (128, 64)),
    "batch and head": lambda: created(by_both, 2, 4, (130, 300)),
    "nothing masked": lambda: created(lambda b, h, q, kv: q >= 0, lengths=(200, 130), block=64),
    "nothing visible": lambda: created(nothing, lengths=(200, 130), block=64),
    "keys that no query sees": lambda: created(visible_padding, block=64),
}
OF_ONE_ENTRY = {
    "made for the first batch entry": lambda: created(by_batch, block=64),
    "made for the first head": lambda: created(by_head, lengths=(300, 300), block=64),
}


@pytest.mark.parametrize("name", CREATED)
def test_created_from_the_mask_mod(name):
    assert verdict(CREATED[name]()) is None


@pytest.mark.parametrize("name", OF_ONE_ENTRY)
def test_blocks_of_one_entry_do_not_stand_for_all(name):
    assert verdict(OF_ONE_ENTRY[name]()) is KEPT


def test_created_by_a_compiled_function():
    assert verdict(create_block_mask(causal, 2, None, 200, 160, "cpu", _compile=True)) is None


ALL, LOWER, STRICT, EYE = [[1, 1], [1, 1]], [[1, 0], [1, 1]], [[0, 0], [1, 0]], [[1, 0], [0, 1]]
NONE = [[0, 0], [0, 0]]


def of_documents(b, h, q, kv):
    return q // 128 == kv // 128


def _torn():
    """The blocks of the keys of each query, and other ones of the queries of each key."""
    mask = from_blocks(ALL, mask_mod=causal)
    mask.q_num_blocks, mask.q_indices = listed(EYE)
    return mask


FROM_BLOCKS = {
    "more blocks than the mask_mod needs": (lambda: from_blocks(ALL, mask_mod=causal), None),
    "just the blocks that it needs": (lambda: from_blocks(LOWER, mask_mod=causal), None),
    "full blocks where it masks nothing": (lambda: from_blocks(EYE, STRICT, causal), None),
    "documents of one block": (lambda: from_blocks(NONE, EYE, of_documents), None),
    "all full under no mask_mod": (lambda: from_blocks(NONE, ALL), None),
    "all partial under no mask_mod": (lambda: from_blocks(ALL), None),
    "no blocks of queries": (lambda: from_blocks(LOWER, mask_mod=causal, compute_q_blocks=False), None),
    "a pattern of its own": (lambda: from_blocks(EYE), KEPT),
    "a full pattern of its own": (lambda: from_blocks(NONE, EYE), KEPT),
    "empty under no mask_mod": (lambda: from_blocks(NONE), KEPT),
    "all full under a mask_mod that masks": (lambda: from_blocks(NONE, ALL, causal), KEPT),
    "a diagonal block omitted": (lambda: from_blocks(STRICT, mask_mod=causal), KEPT),
    "one block omitted that one row needs": (
        lambda: from_blocks(EYE, mask_mod=or_masks(of_documents, lambda b, h, q, kv: (q == 159) & (kv == 0))), KEPT),
    "a full block with one masked pair": (
        lambda: from_blocks(NONE, ALL, lambda b, h, q, kv: (q != 31) | (kv != 140)), KEPT),
    "full blocks, but not of queries": (lambda: from_blocks(EYE, STRICT, causal, compute_q_blocks=False), KEPT),
    "blocks of queries that differ": (_torn, KEPT),
}  # fmt: skip


@pytest.mark.parametrize("name", FROM_BLOCKS)
def test_blocks_of_the_users_own(name):
    mask, code = FROM_BLOCKS[name]
    assert verdict(mask()) is code


@pytest.mark.parametrize("name", ["a full pattern of its own", "a diagonal block omitted"])
def test_kept_blocks_are_honoured(name):
    mask = FROM_BLOCKS[name][0]()
    args = inputs(mask)
    options = {"inner_backend": "inductor", "lower": "always"}
    close(torch.compile(attend, backend="cudnn_flex", options=options)(*args, mask), honoured(*args, mask))


COMPOSED = {
    "causal and window": and_masks(causal, window),
    "causal and documents": and_masks(causal, by_document),
    "causal and padding": and_masks(causal, by_batch),
    "documents, window and padding": and_masks(by_document, window, by_batch),
    "window or prefix": or_masks(window, lambda b, h, q, kv: kv < 10),
    "causal or documents": or_masks(causal, by_document),
    "(window or padding) and documents": and_masks(or_masks(window, by_batch), by_document),
    "(causal and documents) or window": or_masks(and_masks(causal, by_document), window),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_composed_mask_mods(name):
    assert verdict(created(COMPOSED[name], 2, None, (200, 260), 64)) is None


def _with(mask, mask_mod, lengths):
    """A slice has no mask_mod until the user gives it one."""
    mask.mask_mod, mask.seq_lengths = mask_mod, lengths
    return mask


def _from(offset):
    return lambda b, h, q, kv: q + offset >= kv


RESHAPED = {
    "rows, the mask_mod moved": (lambda: _with(created(lengths=(384, 384))[:, :, 2:3], _from(256), (128, 384)), None),
    "a decoding step": (lambda: _with(created(lengths=(384, 384))[:, :, 1], _from(200), (1, 384)), None),
    "rows, the mask_mod not moved": (lambda: _with(created(lengths=(384, 384))[:, :, 2:3], causal, (128, 384)), KEPT),
    "heads alike": (lambda: _with(created(heads=4)[:, 1:2], causal, (160, 160)), None),
    "a head's blocks for all": (lambda: _with(created(by_head, heads=4, block=64)[:, 0:1], by_head, (160, 160)), KEPT),
    "a batch entry's blocks for another": (
        lambda: _with(created(by_batch, 2, block=64)[1:2], by_batch, (160, 160)), KEPT),
    "cropped": (lambda: created(lengths=(384, 384), block=64)._adjust(200, 130), None),
    "cropped to one row": (lambda: created(by_both, 2, 4, (384, 384))._adjust(1, 384), None),
    "grown beyond its blocks": (lambda: created(lengths=(160, 160))._adjust(384, 384), KEPT),
    "moved to a device": (lambda: created().to("cpu"), None),
}  # fmt: skip


@pytest.mark.parametrize("name", RESHAPED)
def test_slices_and_crops(name):
    mask, code = RESHAPED[name]
    assert verdict(mask()) is code


def test_a_slice_without_a_mask_mod_is_stocks_error():
    mask = created(lengths=(384, 384))[:, :, 2:3]
    with pytest.raises(Exception, match="sliced BlockMask"):
        compiled(attend)(*inputs(mask), mask)


class Model(torch.nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, query, key, value, _):
        return flex_attention(query, key, value, block_mask=self.mask)


HOMES = {
    "an input": lambda mask: attend,
    "an input in a dictionary": lambda mask: lambda q, k, v, m: attend(q, k, v, {"mask": m}["mask"]),
    "a closure": lambda mask: lambda q, k, v, _: attend(q, k, v, mask),
    "an attribute of a module": Model,
    "made in the graph": lambda mask: lambda q, k, v, _: attend(q, k, v, created(by_both, 2, 4)),
    "rebuilt in the graph": lambda mask: lambda q, k, v, m: attend(q, k, v, BlockMask.from_kv_blocks(
        m.kv_num_blocks, m.kv_indices, m.full_kv_num_blocks, m.full_kv_indices, m.BLOCK_SIZE, m.mask_mod,
        m.seq_lengths)),
}  # fmt: skip


@pytest.mark.parametrize("home", HOMES)
def test_where_a_block_mask_lives(home):
    mask = created(by_both, 2, 4)
    assert verdict(mask, HOMES[home](mask)) is None


@pytest.mark.parametrize("mask_mod", [None, lambda b, h, q, kv: kv < 150], ids=["no BlockMask", "a padding BlockMask"])
def test_a_score_mod_that_masks_is_no_disagreement(mask_mod):
    def hides(score, b, h, q, kv):
        return torch.where(q - kv >= 40, score, -torch.inf)

    mask = created(mask_mod, block=64) if mask_mod else None
    args = [draw() for _ in range(3)]
    with collect() as report:
        found = torch.compile(flex_attention, backend="cudnn_flex", options=AOT)(*args, hides, mask)
    assert code_of(report.calls) is None
    close(found, flex_attention(*args, hides, mask))
