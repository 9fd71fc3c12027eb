"""Two GPUs in one process: plans by device, calls on a device that is not the current one, streams of their own."""

from collections import Counter

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import cache_clear, cache_info
from cudnn_flex_compile.bench.mods import causal_padding, softcap
from cudnn_flex_compile.engine.state import engine
from tests.gpu.test_behaviour import assert_right

LENGTH = 256
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    cache_clear()
    torch.manual_seed(0)
    yield
    torch.cuda.set_device(0)


def inputs(device):
    draw = (torch.randn(2, LENGTH, 4, 64, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    return [t.requires_grad_() for t in draw]


def step(function, qkv, *mask):
    """A forward and a backward with the right numbers, on the inputs' device, which need not be the current one."""
    current = torch.cuda.current_device()
    out = function(*qkv, *mask)
    grad = torch.randn_like(out)
    gradients = torch.autograd.grad(out, qkv, grad)
    assert torch.cuda.current_device() == current
    assert {t.device for t in (out, *gradients)} == {qkv[0].device}
    assert_right(out, qkv, softcap(2.0), mask[0].mask_mod if mask else None, grad, gradients)


def compiled(inner):
    def call(q, k, v):
        return flex_attention(q, k, v, softcap(2.0))

    return torch.compile(call, backend="cudnn_flex", options={"inner_backend": inner})


@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_each_device_has_plans_of_its_own(inner):
    function = compiled(inner)
    for device in ("cuda:1", "cuda:0"):
        step(function, inputs(device))
    built = cache_info().builds
    of_devices = Counter(found.plan.device.index for found in engine.plans.values())
    assert of_devices[0] == of_devices[1] >= 2  # a forward and a backward on each
    for device in ("cuda:1", "cuda:0"):
        step(function, inputs(device))
    assert cache_info().builds == built


@pytest.mark.parametrize("current", [0, 1])
def test_calls_on_the_other_device(current):
    torch.cuda.set_device(current)
    function = compiled("inductor")
    for _ in range(3):
        step(function, inputs(f"cuda:{1 - current}"))


def test_block_masks_and_captured_tensors_of_the_other_device():
    """All that is computed outside of the kernel is computed there, too."""
    visible = torch.rand(2, LENGTH, device="cuda:1") > 0.4
    mask = create_block_mask(causal_padding(visible), 2, None, LENGTH, LENGTH, "cuda:1")
    function = torch.compile(lambda q, k, v, m: flex_attention(q, k, v, softcap(2.0), m), backend="cudnn_flex")
    for _ in range(3):
        step(function, inputs("cuda:1"), mask)


def test_devices_take_turns_on_streams_of_their_own():
    function, given = compiled("inductor"), {d: inputs(f"cuda:{d}") for d in range(2)}
    streams = {d: torch.cuda.Stream(d) for d in given}
    for device in (0, 1) * 3:
        streams[device].wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(streams[device]):
            step(function, given[device])
        torch.cuda.current_stream(device).wait_stream(streams[device])
