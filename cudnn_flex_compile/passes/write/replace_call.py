"""Replaces one flex_attention node by the custom op. lower_call.py calls it once it is decided how the call runs."""

import operator
from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from cudnn_flex_compile import ops, torch_private
from cudnn_flex_compile.passes.read.call import Call, example, scale_of
from cudnn_flex_compile.passes.write.block_mask_guards import BlockMaskArguments
from cudnn_flex_compile.passes.write.nodes import size_of


def replace(
    call: Call, key: Node, value: Node, operands: Sequence[Node], ints: Sequence[Any], floats: Sequence[Node],
    program: str, training: bool, blocks: BlockMaskArguments, tiles: Sequence[Node | None], policy: str,
) -> None:  # fmt: skip
    """Rewrites the call's users to the op's outputs, and erases the node itself.

    Args:
        call: the call.
        key, value: the call's, in its own order or in another one.
        operands: [B or 1, H or 1, Sq or 1, Skv or 1] tensors.
        ints: nodes or integers. floats: nodes of 0-d host tensors.
        program: the canonical text of the program.
        training: whether a gradient may be asked for.
        blocks: the op's arguments for the BlockMask.
        tiles: the list of the mask's tiles for each direction that runs by one.
        policy: the text of the policy (config.Policy).
    """
    graph, node = call.node.graph, call.node
    with graph.inserting_before(node):
        key, value = (with_batch(n, call) for n in (key, value))
        arguments = (
            call.query, key, value, list(operands), list(ints), list(floats), program, scale_of(call) or 0.0,
            call.uses(1), training, list(blocks.tensors), list(blocks.layout), blocks.program,
            *tiles, policy,
        )  # fmt: skip
        op = graph.call_function(ops.attention, arguments)
        op.meta.update(node.meta)
        outputs = [graph.call_function(operator.getitem, (op, i)) for i in range(2)]
    fakes = example(node)
    torch_private.set_example(op, (fakes[0], fakes[1], fakes[1]))
    for position, output in enumerate(outputs):
        torch_private.set_example(output, fakes[position])
        for old in call.output(position) if call.uses(position) else ():
            old.replace_all_uses_with(output)
        if not output.users:
            graph.erase_node(output)
    _erase_users(node)
    graph.erase_node(node)


def _erase_users(node: Node) -> None:
    """Erases the users of a node that nothing live reads, the last first."""
    for user in list(node.users):
        _erase_users(user)
        if user in node.users:
            user.graph.erase_node(user)


def with_batch(node: Node, call: Call) -> Node:
    """Keys and values of batch 1 serve queries of any batch; autograd sums their gradients."""
    tensor, wanted, graph = example(node), example(call.query), call.node.graph
    if tensor.shape[0] == wanted.shape[0]:
        return node
    batch = wanted.shape[0]
    size = size_of(call.query, 0, call.node)
    with graph.inserting_before(call.node):
        expanded = graph.call_method("expand", (node, size, -1, -1, -1))
    torch_private.set_example(expanded, tensor.expand(batch, -1, -1, -1))
    return expanded
