"""BlockMasks that change after compilation, on the GPU: numbers or an error, and no synchronisation.

Knows nothing of which BlockMasks are lowered (tests/compile/test_block_mask.py).
"""

import contextlib

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile.bench.mods import causal, causal_padding, sliding, softcap
from cudnn_flex_compile.kernels.repeated import EAGER
from cudnn_flex_compile.report import collect
from tests.gpu.test_behaviour import assert_right, compiled, draw, fresh  # noqa: F401

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
    with pytest.raises(RuntimeError, match="do not agree"):
        function(*qkv, _foreign(mask_of(causal)))
    assert_right(function(*qkv, mask_of(causal)), qkv, None, causal)


def test_training_does_not_wait_for_the_device_in_the_forward():
    """What it does not wait for, the backward looks at."""
    qkv, function = [draw(requires_grad=True) for _ in range(3)], compiled(attend)
    grad = torch.ones_like(qkv[0])
    for _ in range(EAGER + 3):
        torch.autograd.grad(function(*qkv, mask_of(causal)), qkv, grad)
    wrong = _foreign(mask_of(causal))
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # half a second
    out = function(*qkv, wrong)
    assert not torch.cuda.current_stream().query()
    with pytest.raises(RuntimeError, match="do not agree"):
        torch.autograd.grad(out, qkv, grad)
    assert_right(function(*qkv, mask_of(causal)), qkv, None, causal)


def _zeroed(mask):
    mask.kv_num_blocks.zero_()
    mask.full_kv_num_blocks.zero_()
    return mask


def _foreign(mask):
    other = mask_of(lambda b, h, q, kv: q - kv > 130)
    other.mask_mod = mask.mask_mod
    return other


@pytest.mark.parametrize("change", [_zeroed, _foreign], ids=["in place", "another BlockMask"])
def test_swapped_for_one_that_disagrees(change):
    qkv, mask, function = inputs(), mask_of(causal), compiled(attend)
    for _ in range(2):
        assert_right(function(*qkv, mask), qkv, None, causal)
    wrong = change(mask)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="do not agree"):
            function(*qkv, wrong)
    assert_right(function(*qkv, mask_of(causal)), qkv, None, causal)


def test_captured_lengths_change_in_place():
    lengths = torch.tensor([LENGTH, 140], device="cuda")

    def mask_mod(b, h, q, kv):
        return (q >= kv) & (kv < lengths[b])

    qkv, function, mask = inputs(), compiled(attend), mask_of(mask_mod, 2)
    assert_right(function(*qkv, mask), qkv, None, mask_mod)
    lengths.copy_(torch.tensor([100, LENGTH]))
    with pytest.raises(RuntimeError, match="do not agree"):
        function(*qkv, mask)
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
