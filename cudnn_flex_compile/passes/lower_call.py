"""Which road a call takes, and why it takes none: by plans that know its mask, or by a list of its tiles.

Knows nothing of the other calls of a graph but what they share (context.py).
"""

from cudnn_flex_compile.passes.decide import autotune, cost_model, eligibility
from cudnn_flex_compile.passes.decide.candidate import Candidate, Lowered, plan_or_reason
from cudnn_flex_compile.passes.decide.key_compaction import COUNTS, compacted
from cudnn_flex_compile.passes.describe import describe_mask
from cudnn_flex_compile.passes.graph_context import (
    Context,
    cost_inputs_of,
    disagreement,
    given_to,
    measured_slower,
    real_values,
    slower,
)  # fmt: skip
from cudnn_flex_compile.passes.read.call import Call, requires_grad
from cudnn_flex_compile.passes.read.captures import read_captures
from cudnn_flex_compile.passes.read.programs import traced_of
from cudnn_flex_compile.passes.write import tile_lists
from cudnn_flex_compile.passes.write.block_mask_guards import MaskProgram
from cudnn_flex_compile.passes.write.replace_call import replace, with_batch
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.report.call import CallReport
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.text import text

TRY_TILES = (Code.SLOWER, Code.BIAS_BUDGET)  # why a call is not run by plans, but may be by a tile list


def lower_or_reason(call: Call, context: Context, report: CallReport) -> Reason | None:
    refused = eligibility.unsuitable(call)
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
    wrong = None if checked is None else disagreement(call, captures, checked, context)
    if wrong is not None:
        return wrong
    candidate = Candidate(
        call, program, hoisted, captures, training, context.real, context.options.policy.text,
        compacted(program, hoisted), traced.fingerprint,
    )  # fmt: skip

    def by_plans() -> Reason | None:
        return large or _lower_by_plans(candidate, checked, context, report)

    tiled = tile_lists.tiled(candidate, traced)
    if tiled is None:
        return by_plans()
    other = None
    if not split(program.mask).reads_pairs:
        other = by_plans()
        if other is None or other.code not in TRY_TILES:
            return other
    missing = _lower_by_tiles(tiled, checked, context, report)
    if missing is None:
        return None
    other = other or by_plans()
    needed = other is not None and other.code in TRY_TILES and missing.code is Code.TILE_LISTS
    return missing if needed else other


def _lower_by_plans(
    candidate: Candidate, checked: MaskProgram | None, context: Context, report: CallReport
) -> Reason | None:
    """Rewrites the call to run by plans that know its mask, or says why it does not."""
    measured = context.options.autotune and autotune.measurable(candidate)
    why = None if checked is None else context.guards.unsuitable(candidate.call, checked)
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
    candidate: Candidate, checked: MaskProgram | None, context: Context, report: CallReport
) -> Reason | None:
    """Rewrites the call to run by a list of its mask's tiles, or says why it does not."""
    call = candidate.call
    if context.tiles is None:
        return Reason(Code.UNSUPPORTED_CALL, "tile lists are not asked for, or CUDA graphs are captured")
    why = slower(candidate, context) if context.only_faster else None
    if why is not None:
        return why

    def unsuitable() -> Reason | None:
        values = real_values(call, candidate.captures, candidate.hoisted, context)
        return tile_lists.unsuitable(candidate, values, context.options.bias_budget_mb)

    known = ("unsuitable", *given_to(call), candidate.program, candidate.hoisted, *candidate.captures.nodes.values())
    verdict = context.once(known, unsuitable) or plan_or_reason(candidate)
    if isinstance(verdict, Reason):
        return verdict
    _accept(candidate, verdict, context, report)
    _rewrite(candidate, checked, context)
    return None


def _accept(candidate: Candidate, verdict: Lowered, context: Context, report: CallReport) -> None:
    report.strategies, report.errors = verdict
    report.expected = cost_model.expected(cost_inputs_of(candidate, context))


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
    tiles = context.tiles.write(candidate, operands, ints, floats) if candidate.tiled and context.tiles else None
    blocks = context.guards.write(call, checked, program.score, slots, tiles)
    made = (operands, ints, floats, text(program), candidate.training, blocks, tiles, candidate.policy)
    replace(call, key, value, *made)
