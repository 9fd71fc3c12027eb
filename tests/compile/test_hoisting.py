"""What is computed in the surrounding graph: once for all calls that share it, anew where it has changed.

Knows nothing of how operands are computed.
"""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import ops
from cudnn_flex_compile.kernels import block_mask_contract
from cudnn_flex_compile.passes import lower_call
from cudnn_flex_compile.reasons import Code
from tests.compile.test_backend import close, draw, fresh, qkv, run

__all__ = ["fresh"]
TABLE, PADDING = torch.randn(4, 400), torch.rand(2, 160) > 0.3


def relative(score, b, h, q, kv):
    return score + TABLE[h, q - kv + 200]


def graphs_of(function, *args):
    """The graphs that the inner backend gets."""
    found = []

    def inner(graph_module, inputs):
        found.append(graph_module.graph)
        return graph_module.forward

    torch._dynamo.register_backend(inner, name="seen")
    try:
        result, calls = run(function, *args, inner_backend="seen", lower="always")
    finally:
        torch._dynamo.backends.registry._COMPILER_FNS.pop("seen")
    assert all(c.reason is None for c in calls), [str(c.reason) for c in calls]
    return result, found


def operands_of(graphs):
    return [n.args[3] for graph in graphs for n in graph.nodes if n.target is ops.attention]


def test_layers_share_a_bias():
    def model(q, k, v):
        for _ in range(3):
            q = flex_attention(q, k, v, relative) + 1
        return q

    args = qkv()
    result, graphs = graphs_of(model, *args)
    close(result, model(*args))
    (first,), *others = operands_of(graphs)
    assert [rest for (rest,) in others] == [first, first]


def test_layers_share_the_order_of_keys():
    mask = create_block_mask(lambda b, h, q, kv: (q >= kv) & PADDING[b, kv], 2, None, 160, 160, device="cpu")

    def model(q, k, v):
        for _ in range(3):
            q = flex_attention(q, k, v, block_mask=mask) + 1
        return q

    args = qkv()
    result, graphs = graphs_of(model, *args)
    close(result, model(*args))
    orders = {n.args[1:] for graph in graphs for n in graph.nodes if n.target is ops.permute_keys}
    assert len(orders) == 1
    assert len({operands[0] for operands in operands_of(graphs)}) == 1


def test_a_captured_tensor_that_changes_between_layers():
    def model(q, k, v, table):
        def score_mod(s, b, h, i, j):
            return s + table[h, i - j + 200] + table[h, 0]

        q = flex_attention(q, k, v, score_mod) + 1
        table.mul_(-2)
        return flex_attention(q, k, v, score_mod)

    args = qkv()
    found, calls = run(model, *args, TABLE.clone(), lower="always")
    assert all(c.reason is None for c in calls)
    close(found, model(*args, TABLE.clone()))


def test_keys_that_change_between_layers():
    mask = create_block_mask(lambda b, h, q, kv: PADDING[b, kv], 2, None, 160, 160, device="cpu")

    def model(q, k, v):
        q = flex_attention(q, k, v, block_mask=mask) + 1
        k.mul_(-2)
        return flex_attention(q, k, v, block_mask=mask)

    q, k, v = qkv()
    found, calls = run(model, q, k.clone(), v)
    assert all(c.reason is None for c in calls), [str(c.reason) for c in calls]
    close(found, model(q, k.clone(), v))


def test_padding_with_keys_of_batch_one():
    mask = create_block_mask(lambda b, h, q, kv: (q >= kv) & PADDING[b, kv], 2, None, 160, 160, device="cpu")
    args = draw(batch=2), draw(batch=1), draw(batch=1)
    found, calls = run(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), *args)
    assert calls[0].reason is None, str(calls[0].reason)
    close(found, flex_attention(*args, block_mask=mask))


@pytest.mark.parametrize("step", ["replace", "with_batch"])
def test_a_rewrite_that_fails_leaves_the_call_as_it_was(monkeypatch, step):
    mask = create_block_mask(lambda b, h, q, kv: (q >= kv) & PADDING[b, kv], 2, None, 160, 160, device="cpu")
    real, calls_made = getattr(lower_call, step), []

    def fails_once(*args):
        calls_made.append(step)
        if len(calls_made) == 1:
            raise ZeroDivisionError("for the test")
        return real(*args)

    monkeypatch.setattr(lower_call, step, fails_once)
    compared, guard_of = [], block_mask_contract.guard_of
    monkeypatch.setattr(block_mask_contract, "guard_of", lambda *mask: compared.append(mask) or guard_of(*mask))

    def model(q, k, v):
        q = flex_attention(q, k, v, relative, mask) + 1
        return flex_attention(q, k, v, block_mask=mask)

    args = qkv()
    found, calls = run(model, *args, lower="always")
    first = 0 if step == "replace" else 1  # the first call's score reads positions: its keys stay in place
    assert len(compared) == 1  # the BlockMask of the call that was lowered
    assert [c.reason and c.reason.code for c in calls] == [Code.INTERNAL if i == first else None for i in range(2)]
    close(found, model(*args))
