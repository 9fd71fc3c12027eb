"""BlockMasks that change after compilation, on the GPU: stock's numbers at every step, and few synchronisations.

Knows nothing of which BlockMasks are lowered (tests/compile/test_block_mask.py).
"""

import contextlib

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile.bench.mods import causal, causal_padding, sliding, softcap
from cudnn_flex_compile.kernels.hot_function import EAGER
from cudnn_flex_compile.report.report import collect
from tests.gpu.test_behaviour import assert_right, compiled, draw, fresh  # noqa: F401
from tests.support.any_block_masks import MASKS, Case, as_mask_mod, check

LENGTH = 256


def mask_of(mask_mod, batch=None, block=128):
    return create_block_mask(mask_mod, batch, None, LENGTH, LENGTH, "cuda", BLOCK_SIZE=block)


def inputs():
    return [draw(requires_grad=False) for _ in range(3)]


def attend(q, k, v, mask):
    return flex_attention(q, k, v, block_mask=mask)


def padding(step, length=LENGTH):
    """Right, left, scattered, and all masked for one batch entry."""
    where = torch.arange(length, device="cuda")
    scattered = torch.rand(2, length, generator=torch.Generator("cuda").manual_seed(step), device="cuda") > 0.4
    ends = torch.tensor([[length], [length // 3 + step]], device="cuda")
    return (where < ends, where >= length - ends, scattered, (where < ends) & (ends == length))[step % 4]


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_mask_mod_recompiles():
    qkv, function = inputs(), compiled(attend, lower="always")
    for mask_mod in (causal, sliding(50), causal):
        assert_right(function(*qkv, mask_of(mask_mod)), qkv, None, mask_mod)


def test_a_new_block_mask_each_step():
    qkv, function = inputs(), compiled(attend)
    with collect() as report:
        for _ in range(EAGER + 3):
            assert_right(function(*qkv, mask_of(causal)), qkv, None, causal)
    assert len(report.lowered) == len(report.calls) == 1
    mask = mask_of(causal)
    with no_synchronisation():  # the host waits for one number alone
        function(*qkv, mask)
    assert_right(function(*qkv, _foreign(mask_of(causal))), qkv, None, far)
    assert_right(function(*qkv, mask_of(causal)), qkv, None, causal)


def test_the_host_waits_for_nothing_behind_the_comparison():
    """A long kernel that is enqueued after the comparison of an earlier graph delays no later launch."""
    qkv, function = [draw(requires_grad=True) for _ in range(3)], compiled(attend)
    for _ in range(EAGER + 3):
        torch.autograd.grad(function(*qkv, mask_of(causal)), qkv, torch.ones_like(qkv[0]))
    mask = mask_of(causal)
    function(*qkv, mask)
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # half a second
    out = function(*qkv, mask)
    torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert not torch.cuda.current_stream().query()


def _zeroed(mask):
    for count in (mask.kv_num_blocks, mask.full_kv_num_blocks, mask.q_num_blocks, mask.full_q_num_blocks):
        count.zero_()
    return mask


def _foreign(mask):
    other = mask_of(lambda b, h, q, kv: q - kv > 130)
    other.mask_mod = mask.mask_mod
    return other


def far(b, h, q, kv):
    """What is visible by the blocks of `_foreign` and `causal`: the block below the diagonal."""
    return (q // 128 == 1) & (kv // 128 == 0)


def nowhere(b, h, q, kv):
    return q < 0


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("change", "seen"), [(_zeroed, nowhere), (_foreign, far)], ids=["in place", "another"])
def test_swapped_for_one_that_disagrees(change, seen, training):
    qkv, mask = [draw(requires_grad=training) for _ in range(3)], mask_of(causal)
    function, grad = compiled(attend, lower="always"), torch.randn_like(qkv[0])

    def step(mask, mask_mod):
        out = function(*qkv, mask)
        gradients = torch.autograd.grad(out, qkv, grad) if training else []
        assert_right(out, qkv, None, mask_mod, grad if training else None, gradients)

    with collect() as report:
        for _ in range(2):
            step(mask, causal)
        wrong = change(mask)
        for _ in range(2):
            step(wrong, seen)
        step(mask_of(causal), causal)
    assert len(report.lowered) == len(report.calls) == 1


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("number", range(len(MASKS)), ids=list(MASKS))
def test_any_block_mask(number, training):
    """As tests/compile/test_any_block_masks.py, and also those that disagree when they are compiled."""
    for i in range(3):
        check(Case(number + len(MASKS) * (i + 3 * training), "cuda", agreeing=0.8), 6, training)


def test_captured_lengths_change_in_place():
    lengths = torch.tensor([LENGTH, 140], device="cuda")

    def mask_mod(b, h, q, kv):
        return (q >= kv) & (kv < lengths[b])

    qkv, function, mask = inputs(), compiled(attend), mask_of(mask_mod, 2)
    assert_right(function(*qkv, mask), qkv, None, mask_mod)
    lengths.copy_(torch.tensor([100, LENGTH]))
    assert_right(function(*qkv, mask), qkv, None, as_mask_mod(mask))
    assert_right(function(*qkv, mask_of(mask_mod, 2)), qkv, None, mask_mod)


def test_padding_that_changes_each_step():
    qkv, function = inputs(), compiled(attend)
    with collect() as report:
        for step in range(8):
            mask_mod = causal_padding(padding(step))
            assert_right(function(*qkv, mask_of(mask_mod, 2)), qkv, None, mask_mod)
    assert not report.kept


def twelve_layers(q, k, v, mask):
    for _ in range(12):
        q = flex_attention(q, k, v, softcap(20.0), mask)
    return q


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mask_mod", [causal, sliding(50)], ids=["causal", "window"])
def test_layers_that_share_a_mask_never_synchronise(training, mask_mod):
    qkv, mask = [draw(requires_grad=training) for _ in range(3)], mask_of(mask_mod)
    function = compiled(twelve_layers, lower="always")

    def step():
        out = function(*qkv, mask)
        return torch.autograd.grad(out, qkv, torch.ones_like(out)) if training else out

    with collect() as report:
        for _ in range(3):
            step()
    assert len(report.lowered) == 12
    with no_synchronisation():
        step()


def test_a_padding_mask_that_does_not_change_never_synchronises():
    qkv, visible = inputs(), padding(2)
    mask, function = mask_of(causal_padding(visible), 2), compiled(twelve_layers, lower="always")
    for _ in range(3):
        function(*qkv, mask)
    with no_synchronisation():
        function(*qkv, mask)
