"""`Context` is the state that the calls of one graph share while they are lowered: writers, inputs, and past answers.

lower_graph.py makes one for each graph, and lower_call.py asks it.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch.fx import Node

from cudnn_flex_compile.config import Options
from cudnn_flex_compile.passes.decide import cost_inputs, eligibility
from cudnn_flex_compile.passes.decide.candidate import Candidate
from cudnn_flex_compile.passes.decide.key_compaction import COUNTS, Compact, counts_of
from cudnn_flex_compile.passes.decide.measured_times import Budget, several_ranks
from cudnn_flex_compile.passes.read import created_masks
from cudnn_flex_compile.passes.read.call import Call, example, hint
from cudnn_flex_compile.passes.read.captures import Captures
from cudnn_flex_compile.passes.write import block_mask_guards, tile_lists
from cudnn_flex_compile.passes.write.block_mask_guards import MaskProgram
from cudnn_flex_compile.passes.write.operands import Writer, operand_value
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.fingerprint import graph_text
from cudnn_flex_compile.scoremod.partition import Hoisted

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Context:
    """The state that the calls of one graph share.

    It has writers that write each node once (of tiles, none under CUDA graphs), the graph's real inputs, the number of
    calls that share a mask, and answers that take a look at data.

    Attributes:
        options: the options of this compile.
        around: the graph's other work; None where this is nothing but views, and under CUDA graphs, which launch all
            kernels of a step at once.
        budget: the time that this compile may spend on measuring.
    """

    operands: Writer
    tiles: tile_lists.Tiles | None
    guards: block_mask_guards.Guards
    real: dict[Node, Any]
    options: Options
    sharing: Counter[Hashable]
    around: cost_inputs.Workload | None
    budget: Budget
    known: dict[tuple[Any, ...], Any] = field(default_factory=dict[tuple[Any, ...], Any])

    @property
    def only_faster(self) -> bool:
        """Whether calls that are slower on cuDNN are kept."""
        return self.options.lower == "when_faster" and self.options.strategy is None

    def once(self, key: tuple[Any, ...], find: Callable[[], Found]) -> Found:
        if key not in self.known:
            self.known[key] = find()
        return self.known[key]


def mask_of(call: Call) -> Hashable:
    """A key that is equal for calls with the same mask. A mask without a text is equal to no other."""
    return graph_text(call.mask_mod) or call.node, call.mask_captured, call.blocks


def disagreement(call: Call, captures: Captures, checked: MaskProgram, context: Context) -> Reason | None:
    def find() -> Reason | None:
        values = real_values(call, captures, checked.hoisted, context)
        return block_mask_guards.disagreement(call, checked, context.real.get, values)  # pyright: ignore

    captured = tuple(checked.nodes[leaf] for leaf in checked.leaves)
    given = ("disagreement", *given_to(call), checked.program, checked.hoisted, checked.noop, captured)
    return context.once(given, find)


def created_here(call: Call, checked: MaskProgram, context: Context) -> bool:
    """Whether the graph makes the call's BlockMask of its mask_mod."""
    writers = context.operands.writers
    if not created_masks.may_be_made(call, writers):
        return False

    def find() -> bool:
        axes = ir.axes_of(checked.own)
        return created_masks.created_here(call, "b" in axes, "h" in axes, writers)

    captured = tuple(checked.nodes[leaf] for leaf in checked.leaves)
    written = writers.above([*call.mask_captured, *call.blocks], call.node)
    given = (*given_to(call), checked.program, checked.hoisted, checked.noop, captured, written)
    return context.once(("created here", *given), find)


def cost_inputs_of(candidate: Candidate, context: Context) -> cost_inputs.CostInputs:
    call, real = candidate.call, context.real.get
    blocks = context.once(("blocks", *given_to(call)), lambda: cost_inputs.blocks_of(call, real))  # pyright: ignore
    program, hoisted = candidate.running
    inputs = cost_inputs.CostInputs(
        call, program, hoisted, training=candidate.training, lse_gradient=candidate.lse_gradient, blocks=blocks,
        around=context.around, tiled=candidate.tiled, sharing=_sharing(call, blocks, context),
        looks=tile_lists.looked_at(candidate),
    )  # fmt: skip
    if blocks is None or not inputs.reads_mask or not several_ranks():
        return inputs
    # Ranks, each with data of its own, choose alike: by what is the same for all.
    return replace(inputs, blocks=None, sharing=_sharing(call, None, context))


def _sharing(call: Call, blocks: cost_inputs.Blocks | None, context: Context) -> int:
    known = context.sharing[mask_of(call)]
    given = [block for block in call.blocks if block is not None]
    outside = blocks is None and given and all(block.op == "placeholder" for block in given)
    return cost_inputs.LAYERS if outside and known == 1 else known


def given_to(call: Call) -> tuple[Any, ...]:
    return call.node.graph, call.blocks, call.block_sizes, eligibility.sizes_of(call)


Values = tuple[list[torch.Tensor], list[int], list[Any]]  # operands, integers and floats


def at_hand(captures: Captures, context: Context) -> bool:
    """Whether the values of all captured inputs in the call that is being compiled are known."""
    nodes = [node for node in captures.nodes.values() if isinstance(node, Node)]
    return all(context.real.get(node) is not None for node in nodes)


def values_of(candidate: Candidate, context: Context) -> Values | None:
    """The values of the program that runs in the call that is being compiled, if its captured inputs are at hand."""
    return real_values(candidate.call, candidate.captures, candidate.running[1], context, candidate.compact)


def real_values(
    call: Call, captures: Captures, hoisted: Sequence[Hoisted], context: Context, compact: Compact | None = None
) -> Values | None:
    """Operands, integers and floats of the call that is being compiled, if its captured inputs are at hand."""
    if not at_hand(captures, context):
        return None
    values = {leaf: context.real[node] if isinstance(node, Node) else node for leaf, node in captures.nodes.items()}
    numbers = [hint(values[leaf]) for leaf in captures.ints]
    for leaf, number in zip(captures.ints, numbers, strict=True):
        values[leaf] = number
    sizes, device = eligibility.sizes_of(call), example(call.query).device
    with torch.no_grad():
        if compact is not None:
            values[COUNTS] = counts_of(operand_value(compact.columns, values.__getitem__, sizes, device))
        operands = [operand_value(h, values.__getitem__, sizes, device) for h in hoisted]
    return operands, numbers, [values[leaf] for leaf in captures.floats]
