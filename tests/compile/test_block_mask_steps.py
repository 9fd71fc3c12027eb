"""BlockMasks and captured tensors that change after compilation: right at every step, and how often they are compared.

Knows nothing of which BlockMasks are lowered (test_block_mask.py).
"""

import contextlib
import gc
import weakref

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from cudnn_flex_compile.bench.mods import causal
from cudnn_flex_compile.kernels import hot_function
from cudnn_flex_compile.report.report import collect
from tests.compile.test_backend import close, fresh
from tests.support.block_masks import (
    attend,
    by_batch,
    code_of,
    comparisons,
    compilations,
    compiled,
    created,
    from_blocks,
    honoured,
    inputs,
    listed,
    lowered_steps,
    window,
)  # fmt: skip

__all__ = ["comparisons", "fresh"]
LOWER, ALL, EYE = [[1, 0], [1, 1]], [[1, 1], [1, 1]], [[1, 0], [0, 1]]


def padding_mask(lengths, mask_mod=None):
    mask_mod = mask_mod or (lambda b, h, q, kv: (q >= kv) & (kv < lengths[b]))
    return create_block_mask(mask_mod, 2, None, 160, 160, "cpu", BLOCK_SIZE=64)


SWAPS = {
    "another mask_mod": lambda: [created(), created(window), created(), created(by_batch, 2)],
    "a new BlockMask of the same mask_mod each step": lambda: [created() for _ in range(5)],
    "more blocks than needed": lambda: [created(), from_blocks(ALL, [[0, 0], [0, 0]], causal)],
    "a closure made anew": lambda: [padding_mask(torch.tensor(n)) for n in ([150, 30], [20, 160], [1, 64])],
    "another length": lambda: [created(lengths=(n, n)) for n in (160, 300, 130, 200)],
    "another block size": lambda: [created(block=n) for n in (128, 64, 256)],
    "another batch": lambda: [created(batch=n) for n in (None, 2, 1)],
}


@pytest.mark.parametrize("name", SWAPS)
def test_swapped_for_one_that_agrees(name):
    masks = SWAPS[name]()
    steps = [(*inputs(mask), mask) for mask in masks]
    expected = compilations(attend, steps)
    calls = lowered_steps(attend, steps)
    assert code_of(calls) is None
    assert len(calls) == expected


def _zeroed(mask):
    for count in (mask.kv_num_blocks, mask.q_num_blocks):
        count.zero_()
    return mask


def _reordered(mask):
    mask.kv_indices.copy_(mask.kv_indices.flip(-1))
    return mask


def _fuller(mask):
    mask.full_kv_num_blocks.copy_(mask.kv_num_blocks + mask.full_kv_num_blocks)
    mask.full_kv_indices.copy_(listed(LOWER)[1])
    return mask


def _replaced(mask):
    mask.kv_num_blocks = torch.zeros_like(mask.kv_num_blocks)
    return mask


def _another(mask):
    return from_blocks(EYE, [[0, 0], [0, 0]], causal)


DISAGREEING = {
    "counts in place": _zeroed, "indices in place": _reordered, "full blocks in place": _fuller,
    "a tensor replaced": _replaced, "another BlockMask of the same mask_mod": _another,
}  # fmt: skip


@pytest.mark.parametrize("change", DISAGREEING)
@pytest.mark.parametrize("home", ["input", "closure"])
def test_swapped_for_one_that_disagrees(change, home):
    mask = created(causal, 1, 1)
    args, kept = inputs(mask), [mask]
    function = attend if home == "input" else lambda q, k, v, _: attend(q, k, v, kept[0])
    with collect() as report:
        run = compiled(function)
        for _ in range(2):
            close(run(*args, mask), honoured(*args, mask))
        kept[0] = DISAGREEING[change](mask)
        for _ in range(2):
            close(run(*args, kept[0]), honoured(*args, kept[0]))
        again = created(causal, 1, 1)
        kept[0] = again
        close(run(*args, again), honoured(*args, again))
    assert code_of(report.calls) is None
    assert len(report.calls) == 1


@torch.enable_grad()
def test_a_backward_is_that_of_the_block_mask_of_its_forward(trainable, comparisons):
    """Also where another one was run in between, and under hooks that copy what is saved."""
    mask, wrong, run = created(causal, 1, 1), _another(None), compiled(attend)
    for copied in (False, True):
        leaves, expected = [], []
        hooks = torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t)
        outs = []
        for now in (mask, wrong, mask):
            leaves.append([t.requires_grad_() for t in inputs(now)])
            with hooks if copied else contextlib.nullcontext():
                outs.append(run(*leaves[-1], now))
            expected.append(torch.autograd.grad(honoured(*leaves[-1], now).sum(), leaves[-1]))
        for out, qkv, wanted in zip(outs, leaves, expected, strict=True):
            for found, right in zip(torch.autograd.grad(out.sum(), qkv), wanted, strict=True):
                assert (found - right).norm() <= 2**-5 * right.norm()


def test_a_dropped_block_mask_is_freed():
    mask, run = created(causal, 1, 1), compiled(attend)
    args = inputs(mask)
    run(*args, mask)
    left = [weakref.ref(t) for t in (mask.kv_indices, mask.full_kv_indices, mask.q_indices)]
    run(*args, created(causal, 1, 1))
    del mask
    gc.collect()
    assert [ref() for ref in left] == [None] * 3


CAPTURED = {  # the lengths of the next step, and whether its blocks are built from them
    "in place, blocks rebuilt": (True, True), "in place, blocks stale": (True, False),
    "replaced, blocks rebuilt": (False, True), "replaced, blocks stale": (False, False),
}  # fmt: skip


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_tensors_of_the_mask_mod_change(name):
    in_place, rebuilt = CAPTURED[name]
    held = {"lengths": torch.tensor([150, 30])}

    def mask_mod(b, h, q, kv):
        return (q >= kv) & (kv < held["lengths"][b])

    mask = padding_mask(None, mask_mod)
    args, run = inputs(mask), compiled(attend)
    for new in ([150, 30], [30, 160], [10, 30]):
        if in_place:
            held["lengths"].copy_(torch.tensor(new))
        else:
            held["lengths"] = torch.tensor(new)
        mask = padding_mask(None, mask_mod) if rebuilt else mask
        close(run(*args, mask), honoured(*args, mask))


def _lengths_before(q, k, v, mask, lengths, new):
    lengths.copy_(new)
    return attend(q, k, v, mask)


def _blocks_before(q, k, v, mask, lengths, new):
    mask.kv_num_blocks.mul_((new > 64)[:1].to(torch.int32))
    return attend(q, k, v, mask)


def _a_view_before(q, k, v, mask, lengths, new):
    lengths.view(2, 1)[0] = new[0]
    return attend(q, k, v, mask)


CHANGED_INSIDE = {"captured": _lengths_before, "blocks": _blocks_before, "a view of what is captured": _a_view_before}


@pytest.mark.parametrize("name", CHANGED_INSIDE)
def test_changed_in_the_graph_before_the_call(name):
    """The check must see the tensors as the call does."""
    lengths = torch.tensor([150, 30])
    mask = padding_mask(lengths)
    args, run = inputs(mask), compiled(CHANGED_INSIDE[name])
    for new in ([150, 30], [150, 30], [10, 30], [10, 30]):
        close(run(*args, mask, lengths, torch.tensor(new)), honoured(*args, mask))


BY_LENGTH = {
    "a BlockMask": lambda lengths: {"block_mask": padding_mask(lengths)},
    "a score_mod": lambda lengths: {"score_mod": lambda s, b, h, q, kv: torch.where(kv < lengths[b], s, -1e4)},
}


@pytest.mark.parametrize("name", BY_LENGTH)
def test_changed_in_the_graph_between_two_calls(name):
    def model(q, k, v, lengths, new):
        first = flex_attention(q, k, v, **BY_LENGTH[name](lengths))
        lengths.copy_(new)
        return torch.cat([first, flex_attention(q, k, v, **BY_LENGTH[name](lengths))])

    new = torch.tensor([10, 100])
    steps = [(*inputs(created()), torch.tensor([150, 30]), new)]
    calls = lowered_steps(model, steps, lambda q, k, v, lengths, new: model(q, k, v, torch.tensor([150, 30]), new))
    assert code_of(calls) is None


def layers(q, k, v, mask, count=4):
    for _ in range(count):
        q = flex_attention(q, k, v, block_mask=mask)
    return q


def test_layers_share_one_comparison(comparisons):
    mask = created(by_batch, 2, 4, block=64)
    args, run = inputs(mask), compiled(layers)
    seen = []
    for step in (mask, mask, mask, created(by_batch, 2, 4, block=64), mask):
        close(run(*args, step), layers(*args, step))
        seen.append(len(comparisons))
    assert seen == [1, 1, 1, 2, 2]


def test_each_of_two_masks_is_compared_once(comparisons):
    def model(q, k, v, near, far):
        return layers(layers(q, k, v, near, 2), k, v, far, 2)

    near, far = created(window), created()
    args, run = inputs(near), compiled(model)
    for _ in range(3):
        close(run(*args, near, far), model(*args, near, far))
    assert len(comparisons) == 2
    run(*args, near, created())
    assert len(comparisons) == 3


MADE_INSIDE = {
    "from an input": lambda q, k, v, lengths: layers(q, k, v, padding_mask(lengths)),
    "from nothing": lambda q, k, v, lengths: layers(q, k, v, created()),
    "from a captured tensor": lambda q, k, v, lengths: layers(q, k, v, created(by_batch, 2)),
    "in each layer": lambda q, k, v, lengths: layers(layers(q, k, v, padding_mask(lengths), 1), k, v,
                                                     padding_mask(lengths), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE_INSIDE)
def test_made_in_the_graph_it_agrees_and_is_not_compared(name, comparisons):
    function, args = MADE_INSIDE[name], inputs(created())
    with collect() as report:
        run = compiled(function)
        for lengths in ([150, 30], [30, 160], [30, 160]):
            close(run(*args, torch.tensor(lengths)), function(*args, torch.tensor(lengths)))
    assert code_of(report.calls) is None
    assert not comparisons


def _sparser(lengths):
    """Made in the graph: each second block of queries sees itself alone."""
    mask = padding_mask(lengths)
    first = torch.arange(mask.kv_num_blocks.shape[-1]) % 2 == 0
    counts = torch.where(first, mask.kv_num_blocks, 0)
    return from_counts(counts, mask.kv_indices, mask.mask_mod)


def from_counts(counts, indices, mask_mod):
    return BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=64, mask_mod=mask_mod, seq_lengths=(160, 160))


def test_blocks_made_in_the_graph_that_are_sparser():
    """No data are there when it is compiled: the call is lowered, and right at the first step already."""
    args = inputs(created())
    with collect() as report:
        run = compiled(lambda q, k, v, lengths: layers(q, k, v, _sparser(lengths), 2))
        for lengths in (torch.tensor([150, 30]), torch.tensor([30, 160])):
            mask = _sparser(lengths)
            expected = honoured(honoured(*args, mask), *args[1:], mask)
            close(run(*args, lengths), expected)
    assert code_of(report.calls) is None


@pytest.mark.parametrize("captured", [False, True], ids=["causal", "lengths"])
def test_new_block_masks_at_every_step_are_compared_by_a_compiled_function(captured, monkeypatch):
    layouts, compile = [], hot_function.HotFunction._compile
    monkeypatch.setattr(hot_function, "_pays", lambda tensor: True)
    monkeypatch.setattr(hot_function.HotFunction, "_compile", lambda *a: layouts.append(1) or compile(*a))

    def mask_of(step):
        lengths = torch.tensor([150 - step, 30 + step])
        return padding_mask(lengths) if captured else created()

    steps = [(*inputs(mask), mask) for mask in map(mask_of, range(hot_function.EAGER + 4))]
    run = compiled(attend)
    for args in steps:
        close(run(*args), attend(*args))
    wrong = mask_of(0)
    wrong.kv_num_blocks.zero_()
    close(run(*steps[0][:3], wrong), honoured(*steps[0][:3], wrong))
    assert len(layouts) == 1
