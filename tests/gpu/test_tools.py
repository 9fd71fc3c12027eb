"""On the GPU, where calls skip torch's dispatcher: autocast, the FLOP counter, the profiler, checkpointing by op."""

import functools

import pytest
import torch
import torch._inductor.config as inductor_config
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from cudnn_flex_compile import cache_clear, ops
from cudnn_flex_compile.backend import cudnn_flex
from cudnn_flex_compile.bench.mods import softcap
from cudnn_flex_compile.kernels import bound_calls, cuda
from cudnn_flex_compile.report.report import collect

LENGTH, DIM, HEADS = 256, 64, 4
FLOPS = 2 * 2 * HEADS * LENGTH * LENGTH * DIM  # of one product over all pairs, batch 2
CAP = softcap(2.0)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def qkv(dtype=torch.bfloat16):
    return [torch.randn(2, LENGTH, HEADS, DIM, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_()
            for _ in range(3)]  # fmt: skip


def alone(q, k, v):
    return flex_attention(q, k, v, CAP)


def among_others(q, k, v):
    return flex_attention(q * 2, k, v, CAP) + 1


BOTH = pytest.mark.parametrize("function", [alone, among_others], ids=["direct", "inductor"])


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(function, dtype):
    args = qkv(torch.float32)
    with torch.autocast("cuda", dtype), collect() as report:
        out = torch.compile(function, backend="cudnn_flex")(*args)
    report.assert_all_lowered()
    torch._dynamo.reset()
    # torch 2.11's caches give the graph of another autocast dtype
    with torch.autocast("cuda", dtype), inductor_config.patch(force_disable_caches=True):
        stock = torch.compile(function, backend="inductor")(*args)
    assert out.dtype == stock.dtype
    grad = torch.randn_like(out)
    pairs = [torch.autograd.grad(result, args, grad) for result in (out, stock)]
    for f, s in zip((out, *pairs[0]), (stock, *pairs[1]), strict=True):
        assert f.dtype == s.dtype
        assert (f - s).norm() <= 2e-2 * s.norm()


@BOTH
def test_flops_of_a_compiled_graph(function):
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(cudnn_flex(graph_module, example_inputs))
        return graphs[-1]

    args = qkv()
    torch.compile(function, backend=backend)(*args)
    with FlopCounterMode(display=False) as counter:
        graphs[0](*args)[0].sum().backward()
    found = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    assert found["cudnn_flex.attention_forward"] == 2 * FLOPS
    assert found["cudnn_flex.attention_backward"] == 5 * FLOPS


@BOTH
def test_a_profile_names_programs(function):
    args, compiled = qkv(), torch.compile(function, backend="cudnn_flex")
    compiled(*args)
    with torch.profiler.profile() as profile:
        compiled(*args).sum().backward()
    names = {event.key for event in profile.key_averages()}
    for way in ("forward", "backward"):
        assert {f"cudnn_flex::attention_{way}", f"cudnn_flex {way}: tanh(score / 2) * 2"} <= names


def saved(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op is ops.attention_forward else CheckpointPolicy.PREFER_RECOMPUTE


@BOTH
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("forwards", [1, 2])
def test_checkpointing_by_op(function, inside, forwards, monkeypatch):
    """By op, one forward; of the region as a whole, two."""
    ran = []
    cache_clear()
    monkeypatch.setattr(bound_calls, "MOST", 0)  # a bound call would not come by there
    monkeypatch.setattr(cuda, "forward", lambda *a, real=cuda.forward: ran.append(1) or real(*a))
    contexts = functools.partial(create_selective_checkpoint_contexts, saved)
    again = functools.partial(checkpoint, use_reentrant=False, **({"context_fn": contexts} if forwards == 1 else {}))
    args = qkv()
    compiled = functools.partial(torch.compile, backend="cudnn_flex")
    call = compiled(lambda *t: again(function, *t)) if inside else functools.partial(again, compiled(function))
    call(*args).sum().backward()
    assert len(ran) == forwards


@BOTH
def test_a_second_derivative_raises_stocks_error(function):
    """For leaves that are no views: of views AOTAutograd saves detached tensors, and sees no second derivative."""
    query, key, value = (t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in qkv())
    stock = torch.compile(function, backend="inductor")
    ours = torch.compile(function, backend="cudnn_flex")
    for call in (stock, ours):
        torch._dynamo.reset()
        gradient = torch.autograd.grad(call(query, key, value).sum(), query, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            (gradient.square().sum() + query.sum()).backward()
