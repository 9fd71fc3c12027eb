"""Runs a call by the intervals of its mask's rows: documents, prefixes, and whatever else shows few runs of keys a row.

Knows nothing of kernels. The mask may be spelled in any way: what a row sees is found by evaluating the mask at all
pairs, in the surrounding graph, once for all calls that share it, and from that the op `list_tiles` makes the list of
tiles that the kernels go through. It is exact for any mask, and meant for those that bounds do not describe.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from cudnn_flex_compile import ops, torch_private
from cudnn_flex_compile.engine.problem import BACKWARD
from cudnn_flex_compile.engine.tiles.tile_list import Geometry, tiler_of
from cudnn_flex_compile.kernels.block_mask import agree_with_endpoints
from cudnn_flex_compile.passes.decide.candidate import Candidate
from cudnn_flex_compile.passes.read.call import Call, example, hint
from cudnn_flex_compile.passes.read.programs import Traced
from cudnn_flex_compile.passes.write.block_mask_guards import present
from cudnn_flex_compile.passes.write.operands import Writer
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import visible_rows
from cudnn_flex_compile.scoremod.ir import SCORE
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.masks.intervals import NARROW, most_endpoints
from cudnn_flex_compile.scoremod.text import text

ITEMSIZE, MIB = 4, 2**20


def tiled(candidate: Candidate, traced: Traced, directions: tuple[str, ...]) -> Candidate | None:
    """The call by a tile list in these directions; None where no list serves it.

    A list serves plain scores. Where plans would permute keys or read a bias over pairs, it is of another program than
    theirs, with the mask as one predicate of rows and columns, and serves all directions or none.
    """
    if traced.program.score is not SCORE:
        return None
    if candidate.compact is None and not split(candidate.program.mask).reads_pairs:
        return replace(candidate, tiled=directions)
    if traced.pairwise is None or directions != candidate.directions:
        return None
    program, hoisted = traced.pairwise
    return replace(candidate, program=program, hoisted=hoisted, compact=None, tiled=directions)


def unsuitable(candidate: Candidate, values: tuple[Any, Any, Any] | None, budget: int) -> Reason | None:
    """A reason against a tile list that needs no plan.

    Args:
        values: operands, integers and floats of the call that is being compiled, if they are at hand.
        budget: MiB that a list may take.
    """
    device = example(candidate.call.query).device
    refused = unusable(device)
    if refused is not None:
        return refused
    sizes = [*_sizes(candidate.call), *candidate.call.block_sizes]
    sizes += [n for block in present(candidate.call) for n in example(block).shape]
    if not all(isinstance(n, int) for n in sizes):
        return Reason(Code.UNSUPPORTED_CALL, "a tile list of a mask whose sizes change between calls")
    try:
        mebibytes = size_of(candidate) * ITEMSIZE / MIB
    except (NotImplementedError, ValueError, TypeError) as error:  # what the frontend says of head dims, for one
        return Reason(Code.SHAPE_REFUSED, f"tile lists: {error}")
    if mebibytes > budget:
        return Reason(Code.BIAS_BUDGET, f"a list of tiles takes {mebibytes:.0f} MiB, more than bias_budget_mb={budget}")
    if values is not None:
        operands, ints, floats = values
        sizes = _sizes(candidate.call)
        most = most_endpoints(visible_rows(candidate.program.mask, operands, ints, floats, sizes, 1, device))
        if most > NARROW:
            return Reason(Code.SLOWER, f"rows of the mask change up to {most} times between visible and hidden")
    return None


def unusable(device: torch.device) -> Reason | None:
    """A device, or an installation, without the kernels."""
    if device.type != "cuda":
        return Reason(Code.DEVICE, f"no kernels by tile lists on {device}")
    from cudnn_flex_compile.engine.tiles.plan import unusable as without_kernels

    return without_kernels(device.index or 0)


def size_of(candidate: Candidate) -> int:
    """Of a list, in numbers of 4 bytes; 0 on the CPU. Raises what the frontend says of a geometry that it refuses."""
    device = example(candidate.call.query).device
    return tiler_of(_geometry(candidate), device.index or 0).size if device.type == "cuda" else 0


def _sizes(call: Call) -> tuple[Any, Any, Any, Any]:
    return (*example(call.query).shape[:3], example(call.key).shape[2])


def _geometry(candidate: Candidate) -> Geometry:
    call = candidate.call
    query, key, value = (tuple(hint(n) for n in example(n).shape) for n in (call.query, call.key, call.value))
    by_head = "h" in ir.axes_of(candidate.program.mask)
    return Geometry(
        batch=query[0], heads=query[1], kv_heads=key[1], rows=query[2], columns=key[2], dim=query[3],
        value_dim=value[3], mask_heads=query[1] if by_head else 1, training=BACKWARD in candidate.tiled,
        dtype=example(call.query).dtype,
    )  # fmt: skip


class Tiles:
    """Writes the lists of a graph's masks, each once for all calls that share it."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def write(
        self, candidate: Candidate, operands: Sequence[Node], ints: Sequence[Any], floats: Sequence[Node]
    ) -> Node:
        """The node of the list, above the call."""
        call, mask, blocks = candidate.call, candidate.program.mask, present(candidate.call)
        geometry = _geometry(candidate)

        def write() -> Node:
            place = (call.query, call.key, call.node)
            table, most = self._writer.write_endpoints(mask, operands, ints, floats, place)
            arguments = (
                *(table, self._found(call, table, most), blocks, list(call.block_sizes) if blocks else []),
                *(list(operands), list(ints), list(floats), text(candidate.program)),
                *(geometry.numbers, geometry.dtype, size_of(candidate)),
            )
            with call.node.graph.inserting_before(call.node):
                node = call.node.graph.call_function(ops.list_tiles, arguments)
            torch_private.set_example(node, example(table).new_empty(size_of(candidate)))
            return node

        kind = ("tiles", mask, call.block_sizes, geometry)
        return self._writer.once(kind, [*operands, *ints, *floats, *blocks], call.node, write)

    def _found(self, call: Call, table: Node, most: Node) -> Node:
        """How many endpoints there are, and whether the BlockMask's blocks, if there are any, agree with them."""
        sizes, block_sizes = _sizes(call), [hint(example(n)) for n in call.block_sizes]

        def found(table: torch.Tensor, most: torch.Tensor, *blocks: torch.Tensor) -> torch.Tensor:
            agreed = [agree_with_endpoints(blocks, table, sizes, block_sizes).to(torch.int32)] if blocks else []
            return torch.stack((most, *agreed))

        return self._writer.write_function(found, [table, most, *present(call)], call.node)
