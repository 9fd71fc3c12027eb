"""The tests compile the graphs that users have: what tests/support/quick_dynamo.py changes gives the same ones."""

import contextlib
from unittest.mock import patch

import pytest
import torch
from torch._functorch import vmap
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from tests.support import quick_dynamo

LENGTH = 64


def plain(x, numbers):
    return flex_attention(x, x, x, lambda s, b, h, q, kv: s + numbers[h] * (q - kv), return_lse=True)


def with_blocks(x, numbers):
    blocks = create_block_mask(lambda b, h, q, kv: (q >= kv) & (numbers[h] < 2), 1, 2, LENGTH, LENGTH, "cpu")
    return flex_attention(x, x, x, block_mask=blocks)


def with_given_blocks(x, numbers):
    count, index = torch.ones(1, 2, 4, dtype=torch.int32), torch.arange(4, dtype=torch.int32).expand(1, 2, 4, 4)
    blocks = BlockMask.from_kv_blocks(count, index.contiguous(), count, index.contiguous(), BLOCK_SIZE=16)
    return flex_attention(x, x, x, block_mask=blocks)


def of_several(x, numbers):
    swapped = torch.vmap(lambda s, t: (s * t, {"s": s}), in_dims=(0, None), out_dims=1)(x[0], x[0, 0])
    summed = torch.vmap(lambda s, t: s + t, in_dims=(-1, 0))(x[0, :, :, :2], numbers)
    nested = torch.vmap(torch.vmap(torch.dot, in_dims=(0, None)), in_dims=(None, 0), out_dims=1)(x[0, 0], x[0, 1])
    return swapped, summed, nested, torch.vmap(lambda given: given["x"] * 2)({"x": x}), torch.vmap(torch.sin)(x)


@contextlib.contextmanager
def stock():
    """torch as it was before tests/conftest.py."""
    with contextlib.ExitStack() as stack:
        for (place, name, _), before in zip(quick_dynamo.CHANGES, quick_dynamo.STOCK, strict=True):
            stack.enter_context(patch.object(place, name, before))
        yield


def graph(function, inputs):
    """The lines of the graph that Dynamo traces, with the shapes of its nodes, but without where they come from."""
    lines = []

    def backend(graph_module, _):
        text = graph_module.print_readable(print_output=False)
        lines.extend(line for line in text.splitlines() if not line.lstrip().startswith("#"))
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return lines


@pytest.mark.parametrize("function", [plain, with_blocks, with_given_blocks, of_several])
def test_the_graph_is_that_of_stock(function):
    inputs = torch.randn(1, 2, LENGTH, 16), torch.randn(2)
    with stock():
        expected = graph(function, inputs)
    assert sum("_vmap_increment_nesting" in line for line in expected) >= 2
    with contextlib.ExitStack() as stack:
        for place, name, value in quick_dynamo.CHANGES:
            stack.enter_context(patch.object(place, name, value))
        assert graph(function, inputs) == expected


@pytest.mark.parametrize(
    ("function", "in_dims", "args"),
    [
        (lambda x, y: x + y, (0, 0), (torch.ones(2), torch.ones(3))), (torch.add, (0, 0, 0), (torch.ones(2),) * 2),
        (torch.sin, (0,), (torch.tensor(1.0),)), (torch.sin, (0,), (1.0,)), (torch.sin, (None,), (torch.ones(2),)),
        (lambda x: 3, (0,), (torch.ones(2),)), (torch.sin, ("0",), (torch.ones(2),)),
    ],
)  # fmt: skip
def test_errors_are_those_of_stock(function, in_dims, args):
    texts = []
    for implementation in (vmap.vmap_impl, quick_dynamo.vmap_of_tensors):
        with pytest.raises(ValueError, match="vmap") as raised:
            implementation(function, in_dims, 0, "error", None, *args)
        texts.append(str(raised.value))
    assert texts[0] == texts[1]
