"""What is found of a graph besides attention."""

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from cudnn_flex_compile.passes.decide.workload import is_alone, workload_of
from cudnn_flex_compile.passes.read.call import find_calls

BATCH, HEADS, LENGTH, DIM = 2, 4, 32, 16
WIDTH = HEADS * DIM


class Block(nn.Module):
    """Four products: of queries, keys and values, of the output, and two others."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Parameter(torch.zeros(WIDTH, 4 * WIDTH)), nn.Parameter(torch.zeros(4 * WIDTH, WIDTH))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        x = x + self.out(flex_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + torch.relu(x @ self.up).matmul(self.down)


TFLOP = 2 * BATCH * LENGTH * WIDTH * (3 + 1 + 4 + 4) * WIDTH / 1e12


def captured(function, *inputs, dynamic=False):
    graphs = []

    def backend(graph_module, _):
        graphs.append(graph_module)
        return graph_module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    return graphs[0]


def tokens():
    return torch.zeros(BATCH, LENGTH, WIDTH)


def heads():
    return [torch.zeros(BATCH, HEADS, LENGTH, DIM) for _ in range(3)]


def checkpointed(block):
    return lambda x: checkpoint(block, x, use_reentrant=False)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("wrap", [lambda block: block, checkpointed], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("layers", [1, 3])
def test_products_of_a_model(layers, wrap, dynamic):
    blocks = [wrap(Block()) for _ in range(layers)]

    def model(x):
        for block in blocks:
            x = block(x)
        return x

    found = workload_of(captured(model, tokens(), dynamic=dynamic), layers)
    assert (found.products, found.calls) == (4 * layers, layers)
    assert found.tflop == pytest.approx(layers * TFLOP)


def test_products_of_sizes_that_depend_on_data():
    """Counted, and of no known size."""

    def model(x, weight):
        return torch.nn.functional.linear(input=x[x[:, 0] > 0], weight=weight) @ weight

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = workload_of(captured(model, torch.ones(8, 4), torch.ones(4, 4)), 0)
    assert (found.products, found.tflop) == (2, 0.0)


def alone(function, *inputs):
    graph_module = captured(function, *inputs)
    return is_alone(graph_module, list(find_calls(graph_module)))


def causal(b, h, q, kv):
    return q >= kv


BLOCKS = create_block_mask(causal, None, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=16)
ALONE = {
    "views": lambda q, k, v: flex_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2),
    "two calls": lambda q, k, v: flex_attention(flex_attention(q, k, v), k, v, lambda s, *_: torch.tanh(s)),
    "a BlockMask": lambda q, k, v: flex_attention(q, k, v, block_mask=BLOCKS),
    "a captured tensor": lambda q, k, v: flex_attention(q, k, v, lambda s, b, h, i, j: s + v[0, h, 0, 0]),
}


def with_exponents(q, k, v):
    exponents = v[0, :, 0].exp()
    return flex_attention(q, k, v, lambda s, b, h, i, j: s + exponents[h, 0])


AMONG_OTHERS = {
    "after": lambda q, k, v: flex_attention(q, k, v) + 1,
    "before": lambda q, k, v: flex_attention(q * 2, k, v),
    "captured": with_exponents,
}


@pytest.mark.parametrize("name", ALONE)
def test_attention_and_views_are_alone(name):
    assert alone(ALONE[name], *heads())


@pytest.mark.parametrize("name", AMONG_OTHERS)
def test_all_else_is_something_else(name):
    assert not alone(AMONG_OTHERS[name], *heads())
