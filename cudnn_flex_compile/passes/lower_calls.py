"""The pass: decides for each flex_attention call of a graph whether it is lowered, and rewrites those that are.

Knows nothing of the inner backend. An exception in one call keeps that call; the model runs.
"""

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from cudnn_flex_compile.passes import autotune, block_mask, intervals, limits, speed
from cudnn_flex_compile.passes.autocast import with_casts, without_casts
from cudnn_flex_compile.passes.block_mask import MaskProgram
from cudnn_flex_compile.passes.capture import Captures, read_captures
from cudnn_flex_compile.passes.compact import COUNTS, compacted
from cudnn_flex_compile.passes.describe import describe_functions, describe_mask
from cudnn_flex_compile.passes.find import Call, example, find_calls, hint
from cudnn_flex_compile.passes.hoist import Writer, operand_value
from cudnn_flex_compile.passes.prune import live_nodes, prune
from cudnn_flex_compile.passes.rewrite import replace, with_batch
from cudnn_flex_compile.passes.target import Accepted, Target, judge
from cudnn_flex_compile.passes.traced import traced_of
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.report import CallReport
from cudnn_flex_compile.scoremod.fingerprint import graph_text
from cudnn_flex_compile.scoremod.partition import Hoisted
from cudnn_flex_compile.scoremod.text import text

log = logging.getLogger("cudnn_flex_compile")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Context:
    """What the calls of one graph share: writers that write each node once (of tiles, none under CUDA graphs), the
    graph's real inputs, how many calls share a mask, and what was found out about all that, which takes a look at data.
    """

    operands: Writer
    tiles: intervals.Tiles | None
    guards: block_mask.Guards
    real: dict[Node, Any]
    only_faster: bool
    bias_budget: int
    autotune: bool
    sharing: Counter[Hashable]
    known: dict[tuple[Any, ...], Any] = field(default_factory=dict[tuple[Any, ...], Any])

    def once(self, key: tuple[Any, ...], find: Callable[[], Found]) -> Found:
        if key not in self.known:
            self.known[key] = find()
        return self.known[key]


@dataclass(frozen=True, slots=True)
class Lowered:
    """What was done to a graph.

    Attributes:
        calls: one report a call, in order.
        checks: what to call with the graph's inputs before every run.
        checked: whether a run checks anything, in the graph or outside.
    """

    calls: list[CallReport]
    checks: list[block_mask.InputCheck]
    checked: bool


def lower_calls(
    graph_module: GraphModule, example_inputs: Sequence[Any], only_faster: bool = True, bias_budget: int = 256,
    autotuned: bool = False, by_intervals: bool = False,
) -> Lowered:  # fmt: skip
    """Rewrites the graph in place.

    Args:
        only_faster: keep the calls that are slower on cuDNN.
        bias_budget: MiB that one operand over (q, kv) pairs, or one list of tiles, may take.
        autotuned: find out by measuring which calls these are.
        by_intervals: try the interval kernels, for which the host looks at two numbers a step.
    """
    inputs = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    pairs = zip(inputs, example_inputs, strict=False)
    real = {node: value for node, value in pairs if not isinstance(value, FakeTensor)}  # DDP's optimizer gives such
    writer = Writer()
    tiles, guards = intervals.Tiles(writer) if by_intervals else None, block_mask.Guards(inputs, writer)
    sharing = Counter(_mask_of(call) for call in find_calls(graph_module))
    context = Context(writer, tiles, guards, real, only_faster, bias_budget, autotuned, sharing)
    reports: list[CallReport] = []
    changed: list[GraphModule] = []
    live: dict[Graph, set[Node]] = {}
    for call in find_calls(graph_module):  # lazily: each call is read after those before it were rewritten
        if call.node.graph not in live:
            live[call.node.graph] = live_nodes(call.node.graph)
        report = _lower(call, context)
        reports.append(report)
        if report.reason is None:
            changed.append(call.graph_module)
    for module in {id(m): m for m in [*changed, *([graph_module] if changed else [])]}.values():
        prune(module.graph, live.get(module.graph, set()))
        module.graph.lint()
        module.recompile()
    return Lowered(reports, guards.outside, bool(guards.outside) or guards.inside)


def _mask_of(call: Call) -> Hashable:
    """Equal for calls with one mask; what has no text is equal to nothing else."""
    return graph_text(call.mask_mod) or call.node, call.mask_captured, call.blocks


def _lower(call: Call, context: Context) -> CallReport:
    report = CallReport(source=call.source)
    describe_functions(report, call)
    before, checks = set(call.node.graph.nodes), len(context.guards.outside)
    try:
        cast = with_casts(call)
        report.reason = _lower_or_reason(cast, context, report)
        if report.reason is not None:
            without_casts(cast)
    except Exception as error:  # a bug of ours must not stop the model
        log.warning("cudnn_flex: the pass failed on %s; the call is kept", call.source, exc_info=True)
        report.reason, report.strategies = Reason(Code.INTERNAL, f"{type(error).__name__}: {error}"), ()
        _take_back(call, before, context)
        del context.guards.outside[checks:]  # stock flex_attention honours whatever blocks a kept call has
    return report


def _take_back(call: Call, before: set[Node], context: Context) -> None:
    """Erases what was written for a call that is kept."""
    graph = call.node.graph
    for node in reversed(list(graph.nodes)):
        if node not in before and not node.users:
            graph.erase_node(node)
    context.operands.forget()
    context.guards.forget()
    if context.tiles is not None:
        context.tiles.forget()


def _lower_or_reason(call: Call, context: Context, report: CallReport) -> Reason | None:
    refused = limits.unsuitable(call)
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
    large = limits.over_budget(call, hoisted, context.bias_budget)
    if large is not None and traced.pairwise is None:
        return large
    training = bool(example(call.node)[0].requires_grad) or any(part.learned for part in hoisted)
    wrong = None if checked is None else _disagreement(call, captures, checked, context)
    if wrong is not None:
        return wrong
    target = Target(
        call, program, hoisted, captures, training, context.real, compacted(program, hoisted), traced.fingerprint
    )

    def by_plans() -> Reason | None:
        return large or _by_plans(target, checked, context, report)

    tiled = intervals.tiled(target, traced)
    if tiled is None:
        return by_plans()
    other = None
    if not intervals.over_pairs(program.mask):
        other = by_plans()
        if other is None or other.code not in BY_INTERVALS:
            return other
    missing = _by_intervals(tiled, context, report)
    if missing is None:
        return None
    other = other or by_plans()
    needed = other is not None and other.code in BY_INTERVALS and missing.code is Code.INTERVALS
    return missing if needed else other


BY_INTERVALS = (Code.SLOWER, Code.BIAS_BUDGET)  # why a call is not run by plans, but may be by intervals


def _by_plans(target: Target, checked: MaskProgram | None, context: Context, report: CallReport) -> Reason | None:
    """Rewrites the call to run by plans that know its mask, or says why it does not."""
    measured = context.autotune and autotune.measurable(target)
    slower = _slower(target, context) if context.only_faster and not measured else None
    if slower is not None:
        return slower
    verdict = judge(target)
    if isinstance(verdict, Reason):
        return verdict
    slower = _measured_slower(target, context) if context.only_faster and measured else None
    if slower is not None:
        return slower
    _accept(target, verdict, context, report)
    guard = None if checked is None else context.guards.write(target.call, checked)
    _rewrite(target, context, guard)
    return None


def _by_intervals(target: Target, context: Context, report: CallReport) -> Reason | None:
    """Rewrites the call to run by the intervals of its mask's rows, or says why it does not."""
    call = target.call
    if context.tiles is None:
        return Reason(Code.UNSUPPORTED_CALL, "intervals are not asked for, or CUDA graphs are captured")
    slower = _slower(target, context) if context.only_faster else None
    if slower is not None:
        return slower

    def unsuitable() -> Reason | None:
        values = _real_values(call, target.captures, target.hoisted, context)
        return intervals.unsuitable(target, values, context.bias_budget)

    known = ("unsuitable", *_given(call), target.program, target.hoisted, *target.captures.nodes.values())
    verdict = context.once(known, unsuitable) or judge(target)
    if isinstance(verdict, Reason):
        return verdict
    _accept(target, verdict, context, report)
    _rewrite(target, context, None)
    return None


def _accept(target: Target, verdict: Accepted, context: Context, report: CallReport) -> None:
    report.strategies, report.errors = verdict
    report.expected = speed.expected(_facts(target, context))


def _disagreement(call: Call, captures: Captures, checked: MaskProgram, context: Context) -> Reason | None:
    def find() -> Reason | None:
        values = _real_values(call, captures, checked.hoisted, context)
        return block_mask.disagreement(call, checked, context.real.get, values)  # pyright: ignore

    captured = tuple(checked.nodes[leaf] for leaf in checked.leaves)
    given = ("disagreement", *_given(call), checked.program, checked.hoisted, checked.noop, captured)
    return context.once(given, find)


def _slower(target: Target, context: Context) -> Reason | None:
    facts, query = _facts(target, context), example(target.call.query)
    tensors = *_given(target.call), query.dtype, hint(query.shape[3])
    known = facts.program, facts.hoisted, facts.training, facts.lse_gradient, facts.tiled, facts.sharing
    return context.once(("slower", *tensors, *known), lambda: speed.slower(facts))


def _facts(target: Target, context: Context) -> speed.Facts:
    call, real = target.call, context.real.get
    share = context.once(("share", *_given(call)), lambda: speed.share_of(call, real))  # pyright: ignore
    sharing = context.sharing[_mask_of(call)] if target.tiled else 1
    asked = target.training, target.lse_gradient, share, target.tiled, sharing
    return speed.Facts(call, *target.running, *asked)


def _measured_slower(target: Target, context: Context) -> Reason | None:
    """By the rules, where measuring fails."""
    times = autotune.times_of(target)
    return _slower(target, context) if times is None else times.reason


def _given(call: Call) -> tuple[Any, ...]:
    return call.node.graph, call.blocks, call.block_sizes, limits.sizes_of(call)


def _real_values(
    call: Call, captures: Captures, hoisted: Sequence[Hoisted], context: Context
) -> tuple[list[torch.Tensor], list[int], list[Any]] | None:
    """Operands, integers and floats of the call that is being compiled, if its captured inputs are at hand."""
    values = {leaf: context.real.get(node) if isinstance(node, Node) else node for leaf, node in captures.nodes.items()}
    if any(v is None for v in values.values()):
        return None
    numbers = [hint(values[leaf]) for leaf in captures.ints]
    for leaf, number in zip(captures.ints, numbers, strict=True):
        values[leaf] = number
    sizes, device = limits.sizes_of(call), example(call.query).device
    with torch.no_grad():
        operands = [operand_value(h, values.__getitem__, sizes, device) for h in hoisted]
    return operands, numbers, [values[leaf] for leaf in captures.floats]


def _rewrite(target: Target, context: Context, guard: Node | None) -> None:
    call, nodes, writer = target.call, dict(target.captures.nodes), context.operands
    ints = [nodes[leaf] for leaf in target.captures.ints]
    floats = [nodes[leaf] for leaf in target.captures.floats]
    key, value = call.key, call.value
    if target.compact is not None:
        columns = writer.write(target.compact.columns, nodes, call.query, key, call.node)
        order = writer.write_order(columns, key, call.node)
        nodes[COUNTS] = order.counts
        key, value = (writer.permute(with_batch(n, call), order, call.node) for n in (key, value))
    program, hoisted = target.running
    operands = [writer.write(h, nodes, call.query, call.key, call.node) for h in hoisted]
    tiles = context.tiles.write(target, operands, ints, floats) if target.tiled and context.tiles else None
    replace(call, key, value, operands, ints, floats, text(program), target.training, guard, tiles)
