"""The Dynamo backend: runs the pass (passes/lower_graph.py), then the inner backend on the rest of the graph."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.config import Options, options_from
from cudnn_flex_compile.inner import compile_inner
from cudnn_flex_compile.phases import phase
from cudnn_flex_compile.report.all_kept import warn_of_all_kept
from cudnn_flex_compile.report.call import CallReport
from cudnn_flex_compile.report.report import publish
from cudnn_flex_compile.scoremod.text import infix
from cudnn_flex_compile.settings import settings

log = logging.getLogger("cudnn_flex_compile")


def cudnn_flex(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """`torch.compile(model, backend="cudnn_flex", options={...})`.

    Args:
        graph_module: Dynamo's graph, before autograd.
        example_inputs: the inputs of the call that is being compiled.
        options: see config.Options.
        mode: the inner backend's mode.

    Raises:
        ValueError, TypeError: an unknown option or a wrong value, also in an environment variable.
    """
    chosen = options_from(options, mode)
    lower(graph_module, example_inputs, chosen)
    with phase("inner"):
        return compile_inner(graph_module, example_inputs, chosen)


def lower(graph_module: GraphModule, example_inputs: Sequence[Any], options: Options) -> None:
    """Lowers the calls of a graph in place, reports and logs them.

    Args:
        example_inputs: the inputs of the call that is being compiled; empty where they are not at hand.
    """
    from cudnn_flex_compile.passes.lower_graph import lower_calls

    settings()  # a wrong setting is an error here, and not in the midst of a compile
    with phase("lower"), torch_private.without_saved_tensors_hooks():
        calls = lower_calls(graph_module, example_inputs, options)
    publish(calls)
    warn_of_all_kept(calls)
    _log(calls, options)


def _log(calls: list[CallReport], options: Options) -> None:
    if not calls:
        return
    kept = [c for c in calls if c.reason is not None]
    reasons = "; ".join(sorted({str(c.reason) for c in kept}))
    log.info(
        "cudnn_flex: %d flex_attention calls: %d lowered, %d kept%s",
        len(calls), len(calls) - len(kept), len(kept), f" ({reasons})" if reasons else "",
    )  # fmt: skip
    for call in calls if options.verbose else ():
        what = " + ".join(call.strategies) if call.reason is None else f"kept, {call.reason}; {call.reason.advice}"
        score = infix(call.program.score) if call.program else "?"
        log.info("cudnn_flex:   %s [%s] %s", call.source, score, what)
