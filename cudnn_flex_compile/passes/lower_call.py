"""Lowers one call, by plans that know its mask or by a list of the mask's tiles, or gives the reason why it is kept.

lower_graph.py calls it for each call. The calls of a graph share a `Context` (graph_context.py).
"""

import dataclasses

from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.passes.contenders import GRAPHS, Contenders
from cudnn_flex_compile.passes.decide import eligibility
from cudnn_flex_compile.passes.decide.candidate import Candidate
from cudnn_flex_compile.passes.decide.chooser import STOCK, Choice, Way
from cudnn_flex_compile.passes.decide.key_compaction import COUNTS, compacted
from cudnn_flex_compile.passes.describe import describe_mask
from cudnn_flex_compile.passes.graph_context import Context, created_here
from cudnn_flex_compile.passes.read.call import Call, requires_grad
from cudnn_flex_compile.passes.read.captures import read_captures
from cudnn_flex_compile.passes.read.programs import traced_of
from cudnn_flex_compile.passes.write import block_mask_guards
from cudnn_flex_compile.passes.write.block_mask_guards import MaskProgram
from cudnn_flex_compile.passes.write.longer_heads import with_dots
from cudnn_flex_compile.passes.write.replace_call import replace, with_batch
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.report.call import CallReport
from cudnn_flex_compile.scoremod.text import text

# Why a call is not run by graphs, but may be by a tile list, which honours any blocks.
TRY_LISTS = (
    Code.SLOWER, Code.BIAS_BUDGET, Code.LSE_GRADIENT, Code.SHAPE_REFUSED, Code.ILLEGAL_OP, Code.CERTIFICATION,
    Code.BLOCK_MASK, Code.MEMORY,
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
    refused = eligibility.wrong_dtype(call)
    if refused is not None:
        return refused
    large = eligibility.over_budget(call, hoisted, context.options.bias_budget_mb)
    if large is not None and traced.pairwise is None:
        return large
    asked = any(map(requires_grad, (call.query, call.key, call.value))) or any(part.learned for part in hoisted)
    asked = asked or any(not captures.learned.isdisjoint(dot.learned) for dot in traced.dots)
    training = call.mode.grad and asked
    odd = block_mask_guards.one_sided(call)
    if odd is not None:
        return odd
    if checked is not None and created_here(call, checked, context):
        call, checked = dataclasses.replace(call, agrees=True), None
    longer = with_dots(call, traced.dots, captures, context.operands) if traced.dots else call
    if isinstance(longer, Reason):
        return longer
    candidate = Candidate(
        longer, program, hoisted, captures, training, context.real, context.options.policy.text,
        compacted(program, hoisted), traced.fingerprint, dots=traced.dots,
    )  # fmt: skip

    faster = context.only_faster and not candidate.dots
    why = eligibility.unplannable(longer, training) if faster else None
    return why or _lower_in_order(Contenders(candidate, traced, checked, large, context), checked, context, report)


def _forced_away(context: Context) -> Reason | None:
    forced = context.options.strategy == "inductor"
    return Reason(Code.FORCED_BACKEND, "options have strategy='inductor'") if forced else None


def _lower_in_order(
    contenders: Contenders, checked: MaskProgram | None, context: Context, report: CallReport
) -> Reason | None:
    """Rewrites the call to run in the first way of the order that has plans, or gives the reason why none has."""
    choice = contenders.choice()
    refusals: dict[Way, Reason] = {}
    for way in contenders.order(choice):
        verdict = contenders.tried(way)
        if not isinstance(verdict, Reason):
            report.strategies, report.errors = verdict
            report.contenders = choice.contenders(way) if choice is not None else ()
            _rewrite(contenders.ways[way], checked, context)
            return None
        refusals[way] = verdict
        if way == GRAPHS and verdict.code not in TRY_LISTS:
            break
    report.contenders = choice.contenders(STOCK) if choice is not None else ()
    return _most_telling(contenders, choice, refusals, context.options.strategy)


def _no_list(strategy: str | None) -> Reason:
    return Reason(Code.FORCED_BACKEND, f"options have strategy={strategy!r}, and no list serves this score or mask")


def _most_telling(
    contenders: Contenders, choice: Choice | None, refusals: dict[Way, Reason], strategy: str | None
) -> Reason:
    """The reason against graphs; that against lists where this is what a user can change, or where these are forced."""
    lists = next((reason for way, reason in refusals.items() if way == contenders.ways[way].directions), None)
    if choice is None:
        return next(iter(refusals.values()), None) or _no_list(strategy)
    graphs = refusals.get(GRAPHS) or contenders.refused(GRAPHS) or choice.slower
    missing = graphs.code in TRY_LISTS and lists is not None and lists.code is Code.TILE_LISTS
    return lists if missing and lists is not None else graphs


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
