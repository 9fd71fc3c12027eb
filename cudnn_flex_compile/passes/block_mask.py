"""Sees to the BlockMask contract of one call: compared now where the tensors are at hand, and at every step.

Knows nothing of the comparison itself (kernels/block_mask.py).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from cudnn_flex_compile.passes.find import Call, example
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod.ir import TRUE, Program


def present(call: Call) -> list[Node]:
    """The block tensors that there are: kv, full kv, q, full q pairs, in that order."""
    return [block for block in call.blocks if block is not None]


def disagreement(
    call: Call, program: Program, real: Callable[[Node], torch.Tensor | None], values: tuple[Any, Any, Any] | None
) -> Reason | None:
    """A reason if the BlockMask of the call being compiled says something else than the mask_mod.

    Args:
        real: the tensor of this call that a node stands for, if it is an input of the graph.
        values: the program's operands, integers and floats for this call; None if they are not at hand.
    """
    from cudnn_flex_compile.kernels.block_mask import agree

    if not call.blocks:
        return None
    pairs = [call.blocks[i] is None for i in range(0, len(call.blocks), 2)]
    if pairs[0] or pairs[1] != pairs[3]:
        return Reason(Code.BLOCK_MASK, "a BlockMask with full blocks in one direction only")
    tensors = [real(block) for block in present(call)]
    if values is None or any(t is None for t in tensors):
        opaque = Reason(Code.BLOCK_MASK, "blocks of its own under a mask_mod that masks nothing")
        return opaque if program.mask is TRUE else None
    operands, ints, floats = values
    with torch.no_grad():
        same = agree(tensors, operands, ints, floats, program, _sizes(call), call.block_sizes)  # pyright: ignore
    return None if bool(same) else Reason(Code.BLOCK_MASK, "its blocks do not agree with its mask_mod")


def _sizes(call: Call) -> list[int]:
    query, key = example(call.query), example(call.key)
    return [_hint(n) for n in (*query.shape[:3], key.shape[2])]


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


class Guards:
    """Writes the check of each distinct BlockMask into a graph once, for all the calls that use it."""

    def __init__(self) -> None:
        self._written: dict[tuple[Any, ...], Node] = {}

    def write(
        self, call: Call, operands: Sequence[Node], ints: Sequence[Any], floats: Sequence[Node], mask: str
    ) -> Node | None:
        """The node whose value the attention op takes as its guard; None without a BlockMask."""
        if not call.blocks:
            return None
        blocks, graph = present(call), call.node.graph
        key = (graph, *blocks, *operands, *ints, *floats, mask, call.block_sizes)
        if key not in self._written:
            with graph.inserting_before(call.node):
                sizes = [self._size(call, n, d) for n, d in ((call.query, 0), (call.query, 1), (call.query, 2), (call.key, 2))]
                arguments = (blocks, list(operands), list(ints), list(floats), mask, sizes, list(call.block_sizes))
                node = graph.call_function(torch.ops.cudnn_flex.check_block_mask.default, arguments)
            device = example(call.query).device
            node.meta["example_value"] = example(call.query).new_empty((0,), dtype=torch.int32, device=device)
            self._written[key] = node
        return self._written[key]

    def _size(self, call: Call, node: Node, dim: int) -> Any:
        size = example(node).shape[dim]
        return size if isinstance(size, int) else call.node.graph.call_method("size", (node, dim))
