"""Sees to the BlockMask contract of one call: compared now where the tensors are at hand, and at every step.

Knows nothing of the comparison itself (kernels/block_mask.py).
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from cudnn_flex_compile import ops, torch_private
from cudnn_flex_compile.passes.find import Call, changes, example, hint
from cudnn_flex_compile.passes.hoist import Writer, operand_value
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import Expr, Program
from cudnn_flex_compile.scoremod.partition import Hoisted
from cudnn_flex_compile.scoremod.text import text
from cudnn_flex_compile.torch_private import version_of


def present(call: Call) -> list[Node]:
    """The block tensors that there are: kv, full kv, q, full q pairs, in that order."""
    return [block for block in call.blocks if block is not None]


def disagreement(
    call: Call, mask: "MaskProgram", real: Callable[[Node], torch.Tensor | None], values: tuple[Any, Any, Any] | None
) -> Reason | None:
    """A reason if the BlockMask of the call being compiled says something else than the mask_mod.

    Args:
        real: the tensor of this call that a node stands for, if it is an input of the graph.
        values: the mask's operands, integers and floats for this call; None if they are not at hand.
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
        return opaque if mask.noop else None
    operands, ints, floats = values
    with torch.no_grad():
        block_sizes = [hint(example(n)) for n in call.block_sizes]
        same = agree(tensors, operands, ints, floats, mask.program, _sizes(call), block_sizes)  # pyright: ignore
    return None if bool(same) else Reason(Code.BLOCK_MASK, "its blocks do not agree with its mask_mod")


def _sizes(call: Call) -> list[int]:
    query, key = example(call.query), example(call.key)
    return [hint(n) for n in (*query.shape[:3], key.shape[2])]


class InputCheck:
    """The check of one BlockMask that is an input of the graph, like all that its mask_mod captured: a few identity
    tests a step. It keeps the tensors that it saw last, so that no other one can have the identity of one of them.

    Args:
        blocks, captured: positions among the graph's inputs.
        operands: computes the mask's operands from the captured tensors.
        question: what an answer holds for, beside these tensors.
        arguments: of kernels.block_mask.agree, after the operands.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        captured: tuple[int, ...],
        operands: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]],
        question: Hashable,
        arguments: tuple[Any, ...],
    ) -> None:
        from cudnn_flex_compile.kernels import contract
        from cudnn_flex_compile.kernels.block_mask import agree
        from cudnn_flex_compile.kernels.repeated import Repeated

        def compare(*tensors: torch.Tensor) -> torch.Tensor:
            return agree(tensors[: len(blocks)], operands(tensors[len(blocks) :]), *arguments)

        self._blocks, self._captured, self._question = blocks, captured, question
        self._compare, self._contract = Repeated(compare), contract
        self._seen: tuple[tuple[int, torch.Tensor, int], ...] = ()
        self._breaches = 0  # that were known when these were seen

    def __call__(self, inputs: Sequence[Any]) -> None:
        """Raises RuntimeError if the tensors are others than last time and do not agree with the mask, when the host
        looks (kernels/later.py).

        Fake ones, on which DDP's optimizer runs each of its graphs once, have nothing that could be compared.
        """
        first = inputs[self._blocks[0]]
        if torch_private.is_fake(first):
            return
        capturing = first.is_cuda and torch.cuda.is_current_stream_capturing()
        if self._seen and not capturing and self._breaches == self._contract.breaches():
            for position, tensor, version in self._seen:
                if inputs[position] is not tensor or version_of(tensor) != version:
                    break
            else:
                return
        blocks, captured = [inputs[i] for i in self._blocks], [inputs[i] for i in self._captured]
        self._seen, self._breaches = (), self._contract.breaches()
        self._contract.hold(blocks, captured, self._question, lambda: self._compare(*blocks, *captured))
        if not capturing and not any(t.is_inference() for t in (*blocks, *captured)):
            positions = (*self._blocks, *self._captured)
            self._seen = tuple((i, inputs[i], version_of(inputs[i])) for i in positions)


@dataclass(frozen=True, slots=True)
class MaskProgram:
    """A call's mask: its program, what its operands are, and the nodes of what it captured.

    Attributes:
        program: of the mask alone.
        hoisted: its operands.
        nodes: of captures and scalars.
        ints, floats: the scalar leaves, in the order of their positions.
        noop: whether the mask_mod is a constant, so that a BlockMask may well have blocks of its own.
    """

    program: Program
    hoisted: tuple[Hoisted, ...]
    nodes: dict[Expr, Any]
    ints: Sequence[Expr]
    floats: Sequence[Expr]
    noop: bool

    @property
    def leaves(self) -> list[Expr]:
        """The captures and scalars that it reads."""
        roots = (self.program.mask, *(part.expression for part in self.hoisted))
        return [n for n in ir.walk(*roots) if n.kind in ("capture", "scalar")]


class Guards:
    """Sees to it that each distinct BlockMask of a graph is checked once a step, for all calls that use it.

    Outside the graph where its tensors and all that the mask captured are inputs; in the graph otherwise.

    Args:
        inputs: the placeholders of the graph that Dynamo gave, in order.
        writer: writes operands.
    """

    def __init__(self, inputs: Sequence[Node], writer: Writer) -> None:
        self._positions = {node: i for i, node in enumerate(inputs)}
        self._writer = writer
        self._written: dict[tuple[Any, ...], Node | None] = {}
        self.outside: list[InputCheck] = []
        self.inside = False  # whether any check is in the graph

    def forget(self) -> None:
        """Checks anew from now on."""
        self._written.clear()

    def write(self, call: Call, mask: MaskProgram) -> Node | None:
        """The node whose value the attention op takes as its guard, if the check is in the graph."""
        if not call.blocks:
            return None
        blocks = present(call)
        captured = [mask.nodes[n] for n in mask.leaves]
        changed = changes([*blocks, *captured], call.node)
        shapes = [example(n).shape[d] for n, d in _size_sources(call)]
        sizes = tuple(n if isinstance(n, int) else torch_private.expression_of(n) for n in shapes)
        key = (call.node.graph, *blocks, *captured, mask.program, mask.hoisted, call.block_sizes, sizes, changed)
        if key not in self._written:
            outside = None if changed else self._outside(call, mask, shapes)
            self._written[key] = None if outside else self._inside(call, mask, shapes)
            self.outside += [outside] if outside else []
        return self._written[key]

    def _outside(self, call: Call, mask: MaskProgram, sizes: list[Any]) -> InputCheck | None:
        """A check of the graph's inputs, if they are all that it takes."""
        blocks, leaves = present(call), mask.leaves
        static = all(isinstance(n, int) for n in (*sizes, *call.block_sizes))
        nodes = [*blocks, *(mask.nodes[n] for n in leaves)]
        scalars = any(n.kind == "scalar" for n in leaves)
        if not static or scalars or not all(n in self._positions for n in nodes):
            return None
        device = example(call.query).device

        def operands(captured: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            by_leaf = dict(zip(leaves, captured, strict=True))
            return [operand_value(part, by_leaf.__getitem__, tuple(sizes), device) for part in mask.hoisted]

        positions = [self._positions[n] for n in nodes]
        question = (text(mask.program), *mask.hoisted, *sizes, *call.block_sizes)
        arguments = ([], [], mask.program, sizes, list(call.block_sizes))
        of_blocks, of_captured = tuple(positions[: len(blocks)]), tuple(positions[len(blocks) :])
        return InputCheck(of_blocks, of_captured, operands, question, arguments)

    def _inside(self, call: Call, mask: MaskProgram, shapes: list[Any]) -> Node:
        kinds = {n.dtype for n in ir.walk(mask.program.mask) if n.kind == "scalar"}
        operands = [self._writer.write(h, mask.nodes, call.query, call.key, call.node) for h in mask.hoisted]
        ints = [mask.nodes[n] for n in mask.ints] if ir.I32 in kinds else []
        floats = [mask.nodes[n] for n in mask.floats] if ir.F32 in kinds else []
        graph = call.node.graph
        with graph.inserting_before(call.node):
            sizes = [
                size if isinstance(size, int) else graph.call_method("size", (node, dim))
                for size, (node, dim) in zip(shapes, _size_sources(call), strict=True)
            ]
            arguments = (present(call), operands, ints, floats, text(mask.program), sizes, list(call.block_sizes))
            node = graph.call_function(ops.check_block_mask, arguments)
        self.inside = True
        torch_private.set_example(node, example(call.query).new_empty((0,), dtype=torch.int32))
        return node


def _size_sources(call: Call) -> tuple[tuple[Node, int], ...]:
    return (call.query, 0), (call.query, 1), (call.query, 2), (call.key, 2)
