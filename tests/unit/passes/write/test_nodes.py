"""Every node has the example value that readers of Dynamo's graphs expect; one without it keeps a call at most."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.config import Options
from cudnn_flex_compile.passes.lower_graph import lower_calls
from cudnn_flex_compile.passes.read.call import find_calls
from cudnn_flex_compile.reasons import Code

BATCH, HEADS, LENGTH, DIM = 2, 4, 64, 16
PLAIN = Options(lower="always", tile_lists=False)
DTYPES = torch.bfloat16, torch.float32


def graph_of(function, *inputs, dynamic=False):
    """Dynamo's graph of a function, and its example inputs."""
    found = []

    def backend(graph_module, example_inputs):
        found.append((graph_module, example_inputs))
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    return found[0]


def tensors(*batches, dtype=torch.bfloat16):
    return [torch.randn(batch, HEADS, LENGTH, DIM).to(dtype) for batch in batches or (BATCH,) * 3]


def table(dtype, learned):
    """What T5 reads: at indices that another tensor gives."""
    values = torch.randn(8, HEADS).to(dtype).requires_grad_(learned)
    buckets = torch.randint(8, (2 * LENGTH,))
    return lambda q, k, v: flex_attention(q, k, v, lambda s, b, h, i, j: s + values[buckets[j - i + LENGTH], h])


def causal(score_mod=None):
    mask = create_block_mask(lambda b, h, i, j: i >= j, BATCH, None, LENGTH, LENGTH, device="cpu")
    return lambda q, k, v: flex_attention(q, k, v, score_mod, mask)


def padded(q, k, v):
    visible = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    mask = create_block_mask(lambda b, h, i, j: visible[b, j], BATCH, None, LENGTH, LENGTH, device="cpu")
    return flex_attention(q, k, v, block_mask=mask)


def intervals():
    document = torch.arange(LENGTH) // 16
    return lambda q, k, v: flex_attention(
        q, k, v, lambda s, b, h, i, j: torch.where((document[i] == document[j]) & (i >= j), s, -float("inf"))
    )


def autocast(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        return flex_attention(q, k, v, lambda s, b, h, i, j: s * 2)


CASES = {
    **{f"{dtype}, learned {own}": lambda d=dtype, own=own: (table(d, own), tensors())
       for dtype in DTYPES for own in (False, True)},
    "keys of one entry": lambda: (causal(lambda s, b, h, i, j: s + h), tensors(2, 1, 1)),
    "a BlockMask": lambda: (causal(), tensors()),
    "padding": lambda: (padded, tensors()),
    "documents": lambda: (intervals(), tensors()),
    "autocast": lambda: (autocast, tensors(dtype=torch.float32)),
}  # fmt: skip


def without_example(graph):
    return {
        node.name for node in graph.nodes
        if node.op in ("placeholder", "call_function", "call_method") and torch_private.example_of(node, None) is None
    }  # fmt: skip


@pytest.mark.parametrize("options", [Options(lower="always"), Options(lower="always", mode="reduce-overhead")])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_what_the_pass_writes_has_examples(case, dynamic, options, trainable):
    function, inputs = CASES[case]()
    graph_module, examples = graph_of(function, *inputs, dynamic=dynamic)
    before = without_example(graph_module.graph)
    (call,) = lower_calls(graph_module, examples, options)
    assert call.reason is None or call.reason.code is not Code.INTERNAL, call.reason
    assert without_example(graph_module.graph) <= before


@pytest.mark.parametrize("given", ["node", "query", "key", "value", "captured", "blocks"])
def test_a_call_of_what_another_pass_wrote_is_kept(given, trainable):
    bias = torch.randn(HEADS)
    graph_module, examples = graph_of(causal(lambda s, b, h, i, j: s + bias[h]), *tensors())
    (call,) = find_calls(graph_module)
    node = getattr(call, given)
    (node if given not in ("captured", "blocks") else node[0]).meta.clear()
    (report,) = lower_calls(graph_module, examples, PLAIN)
    assert report.reason is not None
    assert report.reason.code is Code.TORCH
