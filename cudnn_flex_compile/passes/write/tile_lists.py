"""Writes the list of a mask's tiles, by which a call runs, for documents, prefixes, and other masks of few runs a row.

The mask may be spelled in any way. The op `list_tiles`, written above the calls that share the mask, makes the list
(kernels/tile_lists.py). It is a list of the mask and of the BlockMask's blocks, with the meaning of stock
flex_attention, so that neither is compared with the other.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from cudnn_flex_compile import ops, torch_private
from cudnn_flex_compile.engine.key import problem_of
from cudnn_flex_compile.engine.problem import BACKWARD
from cudnn_flex_compile.engine.tiles import ahead
from cudnn_flex_compile.engine.tiles.tile_list import ARCHITECTURE, Geometry
from cudnn_flex_compile.engine.tiles.tiler import tiler_of
from cudnn_flex_compile.kernels import list_making, row_tables, tile_lists
from cudnn_flex_compile.kernels.visible_pairs import Pairs, mask_of, text_of
from cudnn_flex_compile.passes.decide.candidate import Candidate, backward_call, forward_call
from cudnn_flex_compile.passes.decide.cost_inputs import Looks
from cudnn_flex_compile.passes.read.call import example, hint
from cudnn_flex_compile.passes.read.programs import Traced
from cudnn_flex_compile.passes.write.block_mask_guards import MaskProgram, present
from cudnn_flex_compile.passes.write.nodes import size_of
from cudnn_flex_compile.passes.write.operands import Writer
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import SCORE
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.masks.intervals import NARROW

MOST = 65  # the most endpoints of a row: with more, hardly a tile is hidden whole


def tiled(candidate: Candidate, traced: Traced, directions: tuple[str, ...]) -> Candidate | None:
    """The call by a tile list in these directions; None where no list serves it.

    A list serves plain scores. Where plans would permute keys or read a bias over pairs, it is of another program than
    theirs, with the mask as one predicate of rows and columns, and serves all directions or none.
    """
    if traced.program.score is not SCORE:
        return None
    shown = traced.shown(candidate.captures)
    by_head = "h" in {*ir.axes_of(traced.program.mask), *ir.axes_of(shown.own), *ir.axes_of(shown.of_score)}
    by_head = by_head or any(hint(example(block).shape[1]) != 1 for block in present(candidate.call))
    heads = hint(example(candidate.call.query).shape[1]) if by_head else 1
    listed = replace(candidate, tiled=directions, mask_heads=heads, shown=shown)
    if candidate.compact is None and not split(candidate.program.mask).reads_pairs:
        return listed
    if traced.pairwise is None or directions != candidate.directions:
        return None
    program, hoisted = traced.pairwise
    return replace(listed, program=program, hoisted=hoisted, compact=None)


def unsuitable(candidate: Candidate, real: Callable[[Node], Any], budget: int) -> Reason | None:
    """A reason against a tile list that needs no plan.

    Args:
        real: the tensor of the call that is being compiled that a node stands for, if it is an input of the graph.
        budget: MiB that a list may take.
    """
    device = example(candidate.call.query).device
    refused = unusable(device)
    if refused is not None:
        return refused
    geometry, given = geometry_of(candidate), _given(candidate, real)
    with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        try:
            if device.type == "cuda":
                tiler_of(geometry, device.index)
        except (NotImplementedError, ValueError, TypeError) as error:  # the frontend refuses head dims so, for one
            return Reason(Code.SHAPE_REFUSED, f"tile lists: {error}")
        return None if given is None else _unsuitable(given, geometry, device, budget)


def _unsuitable(given: "Given", geometry: Geometry, device: torch.device, budget: int) -> Reason | None:
    blocks, captured, ints, floats, program, block_sizes = given
    pairs = Pairs(program, captured, (), ints, floats, geometry.sizes, blocks, block_sizes, device)
    most = list_making.most_endpoints(pairs)
    if isinstance(most, Reason):
        return most
    if most.endpoints > (NARROW if captured and most.slowly else MOST):
        return Reason(Code.SLOWER, f"rows of the mask change up to {most.endpoints} times between visible and hidden")
    if device.type != "cuda":
        return None
    handle = tile_lists.handle_of(*given, geometry.numbers, geometry.dtype, device, budget)
    found = tile_lists.found_now(handle, pairs)
    return found if isinstance(found, Reason) else None


def unusable(device: torch.device) -> Reason | None:
    """A reason against a device, or an installation, that has no such kernels."""
    if device.type != "cuda":
        return Reason(Code.DEVICE, f"no kernels by tile lists on {device}")
    from cudnn_flex_compile.engine.tiles.plan import unusable as without_kernels

    return without_kernels(device.index or 0)


def compile_ahead(candidate: Candidate) -> None:
    """Has the kernels of a call compiled in processes of their own, where its device runs such kernels."""
    device = example(candidate.call.query).device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != divmod(ARCHITECTURE, 10):
        return
    calls = [forward_call(candidate, candidate.running, device)]
    if candidate.training:
        asked = {False, candidate.lse_gradient}
        calls += [backward_call(calls[0], candidate.mask_heads, lse_gradient) for lse_gradient in sorted(asked)]
    ahead.begin([problem_of(call) for call in calls])


def looked_at(candidate: Candidate) -> Looks | None:
    """The look at pairs that the list of each step takes, if it takes one."""
    if not candidate.tiled:
        return None
    mask = mask_of(_text(candidate))
    if not row_tables.looks_at_pairs(mask, bool(present(candidate.call))):
        return None
    named = {*ir.axes_of(mask.own), *ir.axes_of(mask.always), "q", "k"}
    sizes = zip(ir.AXES, geometry_of(candidate).sizes, strict=True)
    return Looks(math.prod(n for axis, n in sizes if axis in named), not mask.reads_floats)


def geometry_of(candidate: Candidate) -> Geometry:
    """The geometry of the call that is being compiled."""
    query = example(candidate.call.query)
    return Geometry.of([hint(n) for n in _numbers(candidate, lambda node, dim: example(node).shape[dim])], query.dtype)


def _numbers(candidate: Candidate, size: Callable[[Node, int], Any]) -> list[Any]:
    """The numbers of a geometry, as the op takes them."""
    call = candidate.call
    query, key, value = call.query, call.key, call.value
    sizes = [size(query, 0), size(query, 1), size(query, 2), size(key, 2), size(key, 1), size(query, 3), size(value, 3)]
    return [*sizes, size(query, 1) if candidate.mask_heads > 1 else 1, int(BACKWARD in candidate.tiled)]


def _mask_of(candidate: Candidate) -> MaskProgram:
    assert candidate.shown is not None
    return candidate.shown


def _text(candidate: Candidate) -> str:
    moved = _mask_of(candidate).by_position()
    return text_of(moved.own, moved.of_score)


# The op's arguments before the geometry: blocks, captured, ints, floats, program, block_sizes.
Given = tuple[list[torch.Tensor], list[torch.Tensor], list[int], list[torch.Tensor], str, list[int]]


def _given(candidate: Candidate, real: Callable[[Node], Any]) -> Given | None:
    """These arguments for the call that is being compiled; None if one is not at hand."""
    call, mask = candidate.call, _mask_of(candidate)

    def values(nodes: Sequence[Any]) -> list[Any]:
        return [real(node) if isinstance(node, Node) else node for node in nodes]

    blocks, captured = values(present(call)), values([mask.nodes[n] for n in mask.captures])
    ints, floats = (values([mask.nodes[n] for n in leaves]) for leaves in (mask.ints, mask.floats))
    if any(value is None for value in (*blocks, *captured, *ints, *floats)):
        return None
    sizes = [hint(example(n)) for n in call.block_sizes] if blocks else []
    return blocks, captured, [hint(n) for n in ints], floats, _text(candidate), sizes


class Tiles:
    """Writes the lists of a graph's masks, each once for all calls that share it.

    Args:
        writer: remembers the nodes that were written.
        budget: MiB that a list may take.
    """

    def __init__(self, writer: Writer, budget: int) -> None:
        self._writer, self._budget = writer, budget

    def write(self, candidate: Candidate) -> Node:
        """The node of the list's handle, above the call."""
        call, mask, blocks = candidate.call, _mask_of(candidate), present(candidate.call)
        captured = [mask.nodes[n] for n in mask.captures]
        ints, floats = ([mask.nodes[n] for n in leaves] for leaves in (mask.ints, mask.floats))
        block_sizes, query = list(call.block_sizes) if blocks else [], example(call.query)
        program, numbers = _text(candidate), _numbers(candidate, lambda node, dim: size_of(node, dim, call.node))

        def write() -> Node:
            arguments = (blocks, captured, ints, floats, program, block_sizes, numbers, query.dtype, query.device)
            with call.node.graph.inserting_before(self._place(sources, call.node)):
                node = call.node.graph.call_function(ops.list_tiles, (*arguments, self._budget))
            torch_private.set_example(node, query.new_empty(0, dtype=torch.int32))
            return node

        sources = [*blocks, *captured, *(n for n in (*ints, *floats, *numbers, *block_sizes) if isinstance(n, Node))]
        fixed = [n if isinstance(n, int) else None for n in (*ints, *numbers, *block_sizes)]
        kind = ("tiles", program, len(blocks), *fixed, query.dtype, query.device)
        return self._writer.once(kind, sources, call.node, write)

    def _place(self, sources: Sequence[Node], before: Node) -> Node:
        """The node above which the list is written: as early as can be, so that the host need not wait for it when the
        first call is launched.
        """
        needed = {*sources, *self._writer.writers.above(sources, before)}
        place = before
        while place.prev.op not in ("placeholder", "root") and place.prev not in needed:
            place = place.prev
        return place
