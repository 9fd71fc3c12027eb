"""The pass: goes through the flex_attention calls of a graph, lowers or keeps each, and prunes the graph.

backend.py runs it before the inner backend; lower_call.py lowers one call. An exception in one call keeps this call,
and the model runs.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.config import Options
from cudnn_flex_compile.passes.decide.eligibility import unrecorded
from cudnn_flex_compile.passes.decide.measured_times import Budget
from cudnn_flex_compile.passes.decide.workload import is_alone, workload_of
from cudnn_flex_compile.passes.describe import describe_functions
from cudnn_flex_compile.passes.graph_context import Context, mask_of
from cudnn_flex_compile.passes.lower_call import lower_or_reason
from cudnn_flex_compile.passes.read.call import Call, find_calls, read_call
from cudnn_flex_compile.passes.write import block_mask_guards, tile_lists
from cudnn_flex_compile.passes.write.casts import with_casts
from cudnn_flex_compile.passes.write.checkpoint_policy import save_as_stock
from cudnn_flex_compile.passes.write.operands import Writer
from cudnn_flex_compile.passes.write.prune import live_nodes, prune
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.report.call import CallReport

log = logging.getLogger("cudnn_flex_compile")


def lower_calls(graph_module: GraphModule, example_inputs: Sequence[Any], options: Options) -> list[CallReport]:
    """Rewrites the graph in place, by the options of this compile, and returns a report of each call, in order."""
    try:
        found = list(find_calls(graph_module))
    except Exception as error:  # another torch may write the node in another way
        log.warning("cudnn_flex: a graph's flex_attention calls cannot be read, and are kept", exc_info=True)
        reason = Reason(Code.TORCH, f"the arguments of flex_attention's node: {type(error).__name__}: {error}")
        return [CallReport(source="unknown source", reason=reason)]
    pairs = zip(graph_module.graph.find_nodes(op="placeholder"), example_inputs, strict=False)
    real = {node: value for node, value in pairs if not torch_private.is_fake(value)}  # DDP's optimizer gives such
    writer = Writer(graph_module)
    captures = options.captures_graphs
    tiled = options.lists_tiles and not captures  # the host can't know a list's memory before a capture
    tiles = tile_lists.Tiles(writer, options.bias_budget_mb) if tiled else None
    guards = block_mask_guards.Guards(writer, captures)
    around = None if captures or is_alone(graph_module, found) else workload_of(graph_module, len(found))
    context = Context(
        operands=writer, tiles=tiles, guards=guards, real=real, options=options,
        sharing=Counter(map(mask_of, found)), around=around, budget=Budget(options.tune_seconds),
    )  # fmt: skip
    reports: list[CallReport] = []
    changed: list[GraphModule] = []
    live: dict[Graph, set[Node]] = {}
    known: dict[Node, CallReport] = {}
    grad_mode = None
    for module, node, mode in [(call.graph_module, call.node, call.mode) for call in found]:
        if mode.grad is not grad_mode:  # nodes of one mode have no gradient in the other
            grad_mode = mode.grad
            writer.forget()
        if node not in known:  # a call in a region that is called several times counts each time, and is lowered once
            if node.graph not in live:
                live[node.graph] = live_nodes(node.graph)
            known[node] = _lower(read_call(module, node, mode), context)  # the calls before it are rewritten by now
            changed += [module] if known[node].reason is None else []
        reports.append(known[node])
    for module in {id(m): m for m in [*changed, *([graph_module] if changed else [])]}.values():
        save_as_stock(module)
        prune(module.graph, live.get(module.graph, set()))
        module.graph.lint()
        module.recompile()
    return reports


def _lower(call: Call, context: Context) -> CallReport:
    report = CallReport(source=call.source)
    describe_functions(report, call)
    report.reason = unrecorded(call)
    if report.reason is not None:
        return report
    before = set(call.node.graph.nodes)
    try:
        report.reason = lower_or_reason(with_casts(call), context, report)
    except Exception as error:  # a bug of ours must not stop the model
        log.warning("cudnn_flex: the pass failed on %s; the call is kept", call.source, exc_info=True)
        report.reason, report.strategies = Reason(Code.INTERNAL, f"{type(error).__name__}: {error}"), ()
    if report.reason is not None:
        _undo(call, before, context)
    return report


def _undo(call: Call, before: set[Node], context: Context) -> None:
    """Erases the nodes that were written for a call that is kept."""
    graph = call.node.graph
    written = [node for node in graph.nodes if node not in before]
    for node in reversed(written):
        if not node.users:
            graph.erase_node(node)
    if written:
        context.operands.forget()
