"""Lowers one call, by plans that know its mask or by a list of the mask's tiles, or gives the reason why it is kept.

lower_graph.py calls it for each call. The calls of a graph share a `Context` (graph_context.py).
"""

from collections.abc import Sequence

from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.passes.decide import autotune, eligibility
from cudnn_flex_compile.passes.decide.candidate import Candidate, Lowered, plan_or_reason
from cudnn_flex_compile.passes.decide.key_compaction import COUNTS, compacted
from cudnn_flex_compile.passes.decide.tile_speed import faster_by_tiles
from cudnn_flex_compile.passes.describe import describe_mask
from cudnn_flex_compile.passes.graph_context import (
    Context,
    cost_inputs_of,
    disagreement,
    expected,
    given_to,
    measured_slower,
    slower,
)  # fmt: skip
from cudnn_flex_compile.passes.read.call import Call, example, requires_grad
from cudnn_flex_compile.passes.read.captures import read_captures
from cudnn_flex_compile.passes.read.programs import Traced, traced_of
from cudnn_flex_compile.passes.write import block_mask_guards, tile_lists
from cudnn_flex_compile.passes.write.block_mask_guards import MaskProgram
from cudnn_flex_compile.passes.write.replace_call import replace, with_batch
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.report.call import CallReport
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.text import text

# Why a call is not run by plans, but may be by a tile list, which honours any blocks.
TRY_TILES = (
    Code.SLOWER, Code.BIAS_BUDGET, Code.LSE_GRADIENT, Code.SHAPE_REFUSED, Code.ILLEGAL_OP, Code.CERTIFICATION,
    Code.BLOCK_MASK,
)  # fmt: skip


def lower_or_reason(call: Call, context: Context, report: CallReport) -> Reason | None:
    refused = eligibility.unsuitable(call) or _forced_away(context)
    if refused is not None:
        return refused
    captures = read_captures(call)
    if isinstance(captures, Reason):
        return captures
    traced = traced_of(call, captures)
    if isinstance(traced, Reason):
        return traced
    program, hoisted, checked = traced.program, traced.hoisted, traced.checked(captures)
    report.program = program
    describe_mask(report, call, hoisted, captures, context.real)
    large = eligibility.over_budget(call, hoisted, context.options.bias_budget_mb)
    if large is not None and traced.pairwise is None:
        return large
    asked = any(map(requires_grad, (call.query, call.key, call.value))) or any(part.learned for part in hoisted)
    training = call.mode.grad and asked
    odd = block_mask_guards.one_sided(call)
    if odd is not None:
        return odd
    candidate = Candidate(
        call, program, hoisted, captures, training, context.real, context.options.policy.text,
        compacted(program, hoisted), traced.fingerprint,
    )  # fmt: skip

    plans = tiles = None
    for way, faster in _contenders(candidate, traced, context):
        compared = None if way.tiled == way.directions else checked
        wrong = None if compared is None else disagreement(call, captures, compared, context)
        if way.tiled:
            tiles = why = wrong or _lower_by_tiles(way, faster, checked, context, report)
        else:
            plans = why = wrong or large or _lower_by_plans(way, checked, context, report)
        if why is None:
            return None
        if not way.tiled and why.code not in TRY_TILES:
            return why
    forced = Reason(Code.FORCED_BACKEND, "options have strategy='tile_lists', and no list serves this score or mask")
    needed = plans is None or (plans.code in TRY_TILES and tiles is not None and tiles.code is Code.TILE_LISTS)
    return (tiles or forced) if needed else plans


def _forced_away(context: Context) -> Reason | None:
    forced = context.options.strategy == "inductor"
    return Reason(Code.FORCED_BACKEND, "options have strategy='inductor'") if forced else None


def _contenders(candidate: Candidate, traced: Traced, context: Context) -> Sequence[tuple[Candidate, bool]]:
    """The ways to run the call, in the order of trial, each with whether it is surely faster than Inductor's kernel."""
    forced, plans = context.options.strategy, [(candidate, False)]
    listed = tile_lists.tiled(candidate, traced, candidate.directions)
    tiles = [] if listed is None else [(listed, False)]
    if forced is not None:
        return tiles if forced == "tile_lists" else plans
    if split(candidate.program.mask).reads_pairs:
        return [*tiles, *plans]
    faster = _faster_by_tiles(candidate, traced, context)
    return [*plans, *tiles] if faster is None else [(faster, True), *plans]


def _faster_by_tiles(candidate: Candidate, traced: Traced, context: Context) -> Candidate | None:
    """The call by a list in the directions in which a list is faster than plans; None where plans are slower than
    Inductor's kernel.
    """
    apart = tile_lists.tiled(candidate, traced, ()) is not None
    if context.tiles is None or context.options.autotune or tile_lists.unusable(example(candidate.call.query).device):
        return None
    if context.only_faster and slower(candidate, context) is not None:
        return None
    directions = faster_by_tiles(cost_inputs_of(candidate, context), apart)
    return tile_lists.tiled(candidate, traced, directions) if directions else None


def _lower_by_plans(
    candidate: Candidate, checked: MaskProgram | None, context: Context, report: CallReport
) -> Reason | None:
    """Rewrites the call to run by plans that know its mask, or gives the reason against it."""
    measured = context.options.autotune and autotune.measurable(candidate)
    why = None if checked is None else context.guards.unsuitable(candidate.call, checked, candidate.training)
    why = why or (slower(candidate, context) if context.only_faster and not measured else None)
    if why is not None:
        return why
    verdict = plan_or_reason(candidate)
    if isinstance(verdict, Reason):
        return verdict
    why = measured_slower(candidate, context) if context.only_faster and measured else None
    if why is not None:
        return why
    _accept(candidate, verdict, context, report)
    _rewrite(candidate, checked, context)
    return None


def _lower_by_tiles(
    candidate: Candidate, faster: bool, checked: MaskProgram | None, context: Context, report: CallReport
) -> Reason | None:
    """Rewrites the call to run by a list of its mask's tiles, in some directions or both, or gives the reason against
    it.
    """
    call = candidate.call
    if context.tiles is None:
        return Reason(Code.UNSUPPORTED_CALL, "tile lists are not asked for, or CUDA graphs are captured")
    why = slower(candidate, context) if context.only_faster and not faster else None
    if why is not None:
        return why

    def unsuitable() -> Reason | None:
        return tile_lists.unsuitable(candidate, context.real.get, context.options.bias_budget_mb)

    known = candidate.tiled, candidate.program, candidate.hoisted, *candidate.captures.nodes.values()
    verdict = context.once(("unsuitable", *given_to(call), *known), unsuitable) or plan_or_reason(candidate)
    if isinstance(verdict, Reason):
        return verdict
    _accept(candidate, verdict, context, report)
    _rewrite(candidate, checked, context)
    return None


def _accept(candidate: Candidate, verdict: Lowered, context: Context, report: CallReport) -> None:
    report.strategies, report.errors = verdict
    report.expected = expected(candidate, context)


def _rewrite(candidate: Candidate, checked: MaskProgram | None, context: Context) -> None:
    call, nodes, writer = candidate.call, dict(candidate.captures.nodes), context.operands
    ints = [nodes[leaf] for leaf in candidate.captures.ints]
    floats = [nodes[leaf] for leaf in candidate.captures.floats]
    key, value, slots = call.key, call.value, None
    if candidate.compact is not None:
        columns = writer.write(candidate.compact.columns, nodes, call.query, key, call.node)
        order = writer.write_order(columns, key, call.node)
        nodes[COUNTS], slots = order.counts, order.slots
        key, value = (writer.permute(with_batch(n, call), order, call.node) for n in (key, value))
    program, hoisted = candidate.running
    operands = [writer.write(h, nodes, call.query, call.key, call.node) for h in hoisted]
    tiles = context.tiles.write(candidate) if candidate.tiled and context.tiles else None
    guard = tiles if candidate.tiled == candidate.directions else None
    blocks = context.guards.write(call, checked, program.score, slots, guard)
    by_direction = [tiles if way in candidate.tiled else None for way in (FORWARD, BACKWARD)]
    made = (operands, ints, floats, text(program), candidate.training, blocks, by_direction, candidate.policy)
    replace(call, key, value, *made)
