"""Calls that are kept before anything of them is traced."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from torch.testing._internal.two_tensor import TwoTensor

from cudnn_flex_compile.config import Options
from cudnn_flex_compile.passes.lower_graph import lower_calls
from cudnn_flex_compile.passes.read.call import find_calls
from cudnn_flex_compile.reasons import Code

SHAPE = (1, 2, 64, 16)

OPTIONS = Options(tile_lists=False)


def graph_of(function):
    """Dynamo's graph of a function of queries, keys and values, and its example inputs."""
    found = []

    def backend(graph_module, example_inputs):
        found.append((graph_module, example_inputs))
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(*(torch.randn(SHAPE, dtype=torch.bfloat16) for _ in range(3)))
    return found[0]


def with_examples(make):
    """The graph of a call, whose queries, keys and values Dynamo would have recorded as what `make` gives."""
    graph_module, inputs = graph_of(lambda q, k, v: flex_attention(q, k, v, lambda s, b, h, i, j: s * 2))
    (call,) = find_calls(graph_module)
    for node in (call.query, call.key, call.value):
        node.meta["example_value"] = make(node.meta["example_value"])
    return graph_module, inputs


def on_cuda(example):
    with FakeTensorMode():
        return torch.empty(example.shape, dtype=example.dtype, device="cuda")


@pytest.mark.parametrize("capturing", [True, False])
def test_a_call_that_is_compiled_under_capture_is_kept(capturing, monkeypatch):
    given = with_examples(on_cuda)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    (call,) = lower_calls(*given, OPTIONS)
    assert (call.reason.code is Code.CAPTURING) == capturing
    assert not capturing or not call.reason.lasting


def test_tensors_that_wrap_others_are_kept():
    (call,) = lower_calls(*with_examples(lambda example: TwoTensor(example, example)), OPTIONS)
    assert call.reason.code is Code.UNSUPPORTED_CALL
    assert "TwoTensor" in call.reason.detail


def test_a_call_whose_largest_scores_are_used_is_kept(monkeypatch):
    """The CPU has no such output, so stock flex_attention is never run here."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    real = flex._apply_kernel_options
    monkeypatch.setattr(flex, "_apply_kernel_options", lambda *given: real(*given[:-1], None) | {"OUTPUT_MAX": True})

    def call(q, k, v):
        return flex_attention(q, k, v, lambda s, b, h, i, j: s * 2, return_aux=AuxRequest(max_scores=True))

    (found,) = lower_calls(*graph_of(call), OPTIONS)
    assert found.reason.code is Code.MAX_SCORES
