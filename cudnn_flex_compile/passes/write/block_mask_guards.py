"""Writes the guard of a call with a BlockMask: its blocks are compared with its mask at every step.

Where the tensors are at hand, they are compared now, too. The call gets the arguments by which it can run as stock
flex_attention does. kernels/block_mask.py compares.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from cudnn_flex_compile import ops, torch_private
from cudnn_flex_compile.passes.read.call import Call, example, hint
from cudnn_flex_compile.passes.write.nodes import size_of
from cudnn_flex_compile.passes.write.operands import Writer
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import TRUE, Expr, Program
from cudnn_flex_compile.scoremod.learned import with_bias, without_bias
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.partition import Hoisted
from cudnn_flex_compile.scoremod.text import text


def present(call: Call) -> list[Node]:
    """The block tensors that a call has to honour, without absent ones: kv, full kv, q, full q pairs, in this order."""
    return [] if call.agrees else [block for block in call.blocks if block is not None]


def one_sided(call: Call) -> Reason | None:
    """A reason if the BlockMask has not the blocks that the ops take."""
    missing = [call.blocks[i] is None for i in range(0, len(call.blocks), 2)]
    if missing and (missing[0] or missing[1] != missing[3]):
        return Reason(Code.BLOCK_MASK, "a BlockMask with full blocks in one direction only")
    return None


def disagreement(
    call: Call, mask: "MaskProgram", real: Callable[[Node], torch.Tensor | None], values: tuple[Any, Any, Any] | None
) -> Reason | None:
    """A reason if the BlockMask of the call that is being compiled disagrees with the mask_mod.

    Args:
        real: the tensor of this call that a node stands for, if it is an input of the graph.
        values: the mask's operands, integers and floats for this call; None if they are not at hand.
    """
    from cudnn_flex_compile.kernels.block_mask import agree

    if not call.blocks:
        return None
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


@dataclass(frozen=True, slots=True)
class MaskProgram:
    """A call's mask_mod: its program, its operands, and the nodes of its captured inputs.

    Attributes:
        program: the program of the mask alone.
        hoisted: its operands.
        own: the mask over captures.
        of_score: the pairs that the score_mod itself leaves visible, over captures; in blocks of any kind.
        nodes: the nodes of captures and scalars.
        ints, floats: the scalar leaves, in the order of their positions.
        noop: whether the mask_mod is a constant, so that a BlockMask may well have blocks of its own.
    """

    program: Program
    hoisted: tuple[Hoisted, ...]
    own: Expr
    of_score: Expr
    nodes: dict[Expr, Any]
    ints: Sequence[Expr]
    floats: Sequence[Expr]
    noop: bool

    @property
    def leaves(self) -> list[Expr]:
        """The captures and scalars that it reads."""
        return [n for n in ir.walk(self.own) if n.kind in ("capture", "scalar")]

    @property
    def captures(self) -> list[Expr]:
        """All captures, those of the mask_mod first."""
        return [n for n in ir.walk(self.own, self.of_score) if n.kind == "capture"]

    def by_position(self) -> "MaskProgram":
        """The same over captures whose positions are those in `captures`."""
        moved = {leaf: ir.capture(i, leaf.dtype) for i, leaf in enumerate(self.captures)}
        own, of_score = (ir.rebuild(root, dict(moved)) for root in (self.own, self.of_score))
        return replace(self, own=own, of_score=of_score)


class BlockMaskArguments(NamedTuple):
    """The arguments of the attention op for a BlockMask (kernels/stock.py): `stock`, `layout`, `by_blocks`."""

    tensors: Sequence[Any] = ()
    layout: Sequence[Any] = ()
    program: str = ""


class Guards:
    """Writes the guards of calls. Each distinct BlockMask is compared once a step, for all calls that use it.

    Args:
        writer: writes operands.
        on_device: whether the device chooses by the result, because the host can't read it under CUDA graphs.
    """

    def __init__(self, writer: Writer, on_device: bool) -> None:
        self._writer, self._on_device = writer, on_device

    def unsuitable(self, call: Call, mask: MaskProgram, training: bool) -> Reason | None:
        """A reason against a comparison on the device."""
        if not call.blocks or not self._on_device:
            return None
        # Inductor's kernel is recorded beside the plan. In training torch once found tensors in the graphs' memory that
        # nothing accounts for, and raised an error (H200, torch 2.11; twelve of thirteen tests passed).
        if training:
            return Reason(Code.BLOCK_MASK, "in training under CUDA graphs, where the host can't compare it")
        sizes = [*_shapes(call), *call.block_sizes, *(n for b in present(call) for n in example(b).shape)]
        static = all(isinstance(n, int) for n in sizes) and not any(n.kind == "scalar" for n in mask.leaves)
        return None if static else Reason(Code.BLOCK_MASK, "under CUDA graphs, beside sizes or numbers that change")

    def write(
        self, call: Call, mask: MaskProgram | None, score: Expr, slots: Node | None = None, tiles: Node | None = None
    ) -> BlockMaskArguments:
        """Writes the guard above the call.

        Args:
            mask: None without a BlockMask.
            score: the score over the operands that the op takes.
            slots: the place to which each key went, if keys come in another order.
            tiles: the list of the mask's tiles, which has the blocks in it, and then stands in the place of a guard.
        """
        if mask is None:
            return BlockMaskArguments()
        blocks, captured = present(call), [mask.nodes[n] for n in mask.captures]
        moved = mask.by_position()
        guard = tiles if tiles is not None else self._guard(call, mask, text(ir.program(mask=moved.own)))
        rest, bias = without_bias(score)
        if moved.of_score is not TRUE:
            rest = make("where", moved.of_score, rest, ir.const(float("-inf"), ir.F32))
        program = ir.program(with_bias(rest, bias), moved.own)
        tensors = [guard, *blocks, *captured, *([] if slots is None else [slots])]
        return BlockMaskArguments(tensors, [len(blocks), len(captured), *call.block_sizes], text(program))

    def _guard(self, call: Call, mask: MaskProgram, program: str) -> Node:
        sizes = tuple(n if isinstance(n, int) else torch_private.expression_of(n) for n in _shapes(call))
        write = self._compared_on_device if self._on_device else self._compared
        sources = [*present(call), *(mask.nodes[n] for n in mask.leaves)]
        kind = ("check", program, call.block_sizes, sizes)
        return self._writer.once(kind, sources, call.node, lambda: write(call, mask, program))

    def _compared(self, call: Call, mask: MaskProgram, program: str) -> Node:
        captured = [mask.nodes[n] for n in ir.walk(mask.own) if n.kind == "capture"]
        ints, floats = ([mask.nodes[n] for n in leaves] for leaves in (mask.ints, mask.floats))
        graph = call.node.graph
        sizes = [size_of(node, dim, call.node) for node, dim in _size_sources(call)]
        with graph.inserting_before(call.node):
            arguments = (present(call), captured, ints, floats, program, sizes, list(call.block_sizes))
            node = graph.call_function(ops.check_block_mask, arguments)
        torch_private.set_example(node, example(call.query).new_empty((0,), dtype=torch.int32))
        return node

    def _compared_on_device(self, call: Call, mask: MaskProgram, program: str) -> Node:
        from cudnn_flex_compile.kernels.block_mask import agree

        blocks, sizes = present(call), _shapes(call)
        operands = [self._writer.write(h, mask.nodes, call.query, call.key, call.node) for h in mask.hoisted]

        def compare(*tensors: torch.Tensor) -> torch.Tensor:
            of_blocks, rest = tensors[: len(blocks)], tensors[len(blocks) :]
            return agree(of_blocks, rest, [], [], mask.program, sizes, call.block_sizes)

        return self._writer.write_function(compare, [*blocks, *operands], call.node)


def _shapes(call: Call) -> list[Any]:
    return [example(n).shape[d] for n, d in _size_sources(call)]


def _size_sources(call: Call) -> tuple[tuple[Node, int], ...]:
    return (call.query, 0), (call.query, 1), (call.query, 2), (call.key, 2)
