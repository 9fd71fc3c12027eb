"""Sees to the BlockMask contract of one call: compared now where the tensors are at hand, and at every step.

Knows nothing of the comparison itself (kernels/block_mask.py).
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from cudnn_flex_compile import ops
from cudnn_flex_compile.passes.find import Call, example, hint
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import TRUE, Program
from cudnn_flex_compile.scoremod.text import text


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
    return [hint(n) for n in (*query.shape[:3], key.shape[2])]


@dataclass(slots=True)
class InputCheck:
    """The check of one BlockMask whose tensors are inputs of the graph: a few identity tests a step.

    Attributes:
        positions: of the block tensors among the graph's inputs.
        arguments: of kernels.block_mask.check, after the tensors.
    """

    positions: tuple[int, ...]
    arguments: tuple[Any, ...]
    _seen: list[tuple["weakref.ref[torch.Tensor]", int]] = field(default_factory=list)  # pyright: ignore

    def __call__(self, inputs: Sequence[Any]) -> None:
        """Raises RuntimeError if the tensors are others than last time and do not agree with the mask."""
        tensors = [inputs[i] for i in self.positions]
        capturing = tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
        if (
            not capturing
            and self._seen
            and all(ref() is t and version == t._version for (ref, version), t in zip(self._seen, tensors, strict=True))
        ):
            return
        from cudnn_flex_compile.kernels.block_mask import check

        check(tensors, *self.arguments)
        if not capturing and not any(t.is_inference() for t in tensors):
            self._seen = [(weakref.ref(t), t._version) for t in tensors]


class Guards:
    """Sees to it that each distinct BlockMask of a graph is checked once a step, for all calls that use it.

    Outside the graph where its tensors are inputs and the mask needs nothing else; in the graph otherwise.

    Args:
        inputs: the placeholders of the graph that Dynamo gave, in order.
    """

    def __init__(self, inputs: Sequence[Node]) -> None:
        self._positions = {node: i for i, node in enumerate(inputs)}
        self._written: dict[tuple[Any, ...], Node | None] = {}
        self.outside: list[InputCheck] = []

    def write(
        self, call: Call, mask: Program, operands: Sequence[Node], ints: Sequence[Any], floats: Sequence[Node]
    ) -> Node | None:
        """The node whose value the attention op takes as its guard, if the check is in the graph."""
        if not call.blocks:
            return None
        kinds = {n.kind if n.kind != "scalar" else n.dtype for n in ir.walk(mask.mask)}
        operands = operands if "operand" in kinds else ()
        ints, floats = (ints if ir.I32 in kinds else ()), (floats if ir.F32 in kinds else ())
        blocks = present(call)
        key = (call.node.graph, *blocks, *operands, *ints, *floats, mask, call.block_sizes)
        if key not in self._written:
            self._written[key] = self._check(call, blocks, operands, ints, floats, text(mask))
        return self._written[key]

    def _check(
        self, call: Call, blocks: list[Node], operands: Sequence[Node], ints: Sequence[Any],
        floats: Sequence[Node], mask: str,
    ) -> Node | None:  # fmt: skip
        shapes = [example(n).shape[d] for n, d in _size_sources(call)]
        static = all(isinstance(n, int) for n in (*shapes, *call.block_sizes))
        if static and not (operands or ints or floats) and all(b in self._positions for b in blocks):
            positions = tuple(self._positions[b] for b in blocks)
            self.outside.append(InputCheck(positions, ([], [], [], mask, shapes, list(call.block_sizes))))
            return None
        graph = call.node.graph
        with graph.inserting_before(call.node):
            sizes = [
                size if isinstance(size, int) else graph.call_method("size", (node, dim))
                for size, (node, dim) in zip(shapes, _size_sources(call), strict=True)
            ]
            arguments = (blocks, list(operands), list(ints), list(floats), mask, sizes, list(call.block_sizes))
            node = graph.call_function(ops.check_block_mask, arguments)
        node.meta["example_value"] = example(call.query).new_empty((0,), dtype=torch.int32)
        return node


def _size_sources(call: Call) -> tuple[tuple[Node, int], ...]:
    return (call.query, 0), (call.query, 1), (call.query, 2), (call.key, 2)
