"""Writes the casts of queries, keys and values that torch.autocast makes of a call.

Dynamo recorded the effect of autocast on a call in the dtype of its output, so that no region is looked at. Stock
flex_attention, eager and compiled alike (torch 2.11 and later: `_flex_attention_autocast_impl` of torch's
flex_attention), casts all three to autocast's dtype, and its output has the query's; captured tensors stay as they are.
Keys and values of another dtype are no sign of autocast: stock takes them outside of autocast, too.
"""

from dataclasses import replace

import torch
from torch.fx import Node

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.passes.read.call import Call, example


def with_casts(call: Call) -> Call:
    """The call on tensors of autocast's dtype: the same one outside of autocast."""
    dtype = example(call.node)[0].dtype
    if example(call.query).dtype == dtype:
        return call
    return replace(call, **{name: _cast(getattr(call, name), dtype, call.node) for name in ("query", "key", "value")})


def _cast(node: Node, dtype: torch.dtype, before: Node) -> Node:
    tensor = example(node)
    if tensor.dtype == dtype:
        return node
    with before.graph.inserting_before(before):
        cast = before.graph.call_method("to", (node, dtype))
    torch_private.set_example(cast, tensor.to(dtype))
    return cast
