"""Builds the cuDNN graph of one problem under one lowering: an SDPA node, its callbacks, inputs and outputs.

engine/plans/graph_plan.py calls it; the strategies (strategies/) give the lowering.
"""

from dataclasses import dataclass
from typing import Any

import cudnn

from cudnn_flex_compile.engine import frontend
from cudnn_flex_compile.engine.graph.callbacks import Callbacks
from cudnn_flex_compile.engine.graph.emit import FLOAT, TENSOR_TYPES, Inputs
from cudnn_flex_compile.engine.graph.lowering import Lowering
from cudnn_flex_compile.engine.problem import FORWARD, Problem, TensorSpec, output_specs, stats_spec
from cudnn_flex_compile.scoremod.switches import on


@dataclass(slots=True)
class AttentionGraph:
    """A graph before it is built, with its tensors by role.

    Attributes:
        graph: the pygraph.
        roles: the graph tensor of each device tensor: query, key, value, out, stats, grad_out, dq,
            dk, dv, dbias.
        inputs: operands, scalars and constants.
        callbacks: the state of the graph's callbacks while it is built.
    """

    graph: Any
    roles: dict[str, Any]
    inputs: Inputs
    callbacks: Callbacks


def assemble(problem: Problem, lowering: Lowering, **graph_arguments: Any) -> AttentionGraph:
    """The graph, with all its nodes; `graph_arguments` name the handle, or the device of a deviceless graph."""
    graph = frontend.Graph(
        io_data_type=TENSOR_TYPES[problem.query.dtype],
        intermediate_data_type=FLOAT,
        compute_data_type=FLOAT,
        **graph_arguments,
    )
    inputs = Inputs(graph, problem, expanded=lowering.expanded)
    roles = {name: _declare(graph, getattr(problem, name)) for name in ("query", "key", "value")}
    if lowering.bias is not None:
        inputs.operands[lowering.bias] = _declare(graph, problem.operands[lowering.bias])
    if lowering.lengths is None:
        inputs.declare(*lowering.leaves)
    callbacks = Callbacks([(inputs, lowering)], graph.links)
    add = _forward if problem.direction == FORWARD else _backward
    add(graph, problem, callbacks, roles)
    return AttentionGraph(graph, roles, inputs, callbacks)


def _declare(graph: Any, spec: TensorSpec) -> Any:
    return graph.tensor(dim=spec.shape, stride=spec.stride, data_type=TENSOR_TYPES[spec.dtype])


def _output(tensor: Any, spec: TensorSpec) -> Any:
    tensor.set_output(True).set_dim(list(spec.shape)).set_stride(list(spec.stride))
    tensor.set_data_type(TENSOR_TYPES[spec.dtype])
    return tensor


def _arguments(callbacks: Callbacks) -> tuple[dict[str, Any], bool]:
    """Native arguments, and whether there is a score_mod."""
    inputs, lowering = callbacks.building[0]
    arguments = dict(lowering.native)
    if lowering.bias is not None:
        arguments["bias"] = inputs.operands[lowering.bias]
    if lowering.lengths is not None:
        arguments["use_padding_mask"] = True
        arguments["seq_len_q"] = inputs.length(inputs.problem.lengths[0])
        arguments["seq_len_kv"] = inputs.length(operand=lowering.lengths)
    return arguments, lowering.score_mod is not None


def _forward(graph: Any, problem: Problem, callbacks: Callbacks, roles: dict[str, Any]) -> None:
    extra, modified = _arguments(callbacks)
    if modified:
        extra["score_mod"] = callbacks.score_mod
        if on("composite"):  # AUTO may pick the unified engine, which loses tile skipping and has read illegal memory
            extra["implementation"] = cudnn.attention_implementation.COMPOSITE
    out, stats = graph.sdpa(
        name="attention",
        q=roles["query"],
        k=roles["key"],
        v=roles["value"],
        attn_scale=problem.scale,
        generate_stats=problem.stats,
        **extra,
    )
    roles["out"] = _output(out, problem.out)
    if problem.stats:
        roles["stats"] = _output(stats, stats_spec(problem))


def _backward(graph: Any, problem: Problem, callbacks: Callbacks, roles: dict[str, Any]) -> None:
    roles["out"] = _declare(graph, problem.out)
    roles["grad_out"] = _declare(graph, problem.grad or problem.out)
    roles["stats"] = _declare(graph, stats_spec(problem))
    extra, modified = _arguments(callbacks)
    if modified:
        extra |= {"score_mod": callbacks.score_mod, "score_mod_bprop": callbacks.score_mod_bprop}
    if problem.deterministic:
        extra["use_deterministic_algorithm"] = True
    specs = dict(zip(GRADIENTS, output_specs(problem), strict=False))
    if "dbias" in specs:
        extra["dBias"] = roles["dbias"] = _output(_declare(graph, specs["dbias"]), specs["dbias"])
    gradients = graph.sdpa_backward(
        name="attention_backward",
        q=roles["query"],
        k=roles["key"],
        v=roles["value"],
        o=roles["out"],
        dO=roles["grad_out"],
        stats=roles["stats"],
        attn_scale=problem.scale,
        **extra,
    )
    for name, tensor in zip(GRADIENTS, gradients, strict=False):
        roles[name] = _output(tensor, specs[name])


GRADIENTS = ("dq", "dk", "dv", "dbias")  # dbias only where an operand is learned
