"""Compiles for inference with torch_tensorrt: TensorRT engines run everything around attention.

TensorRT has no converter for our ops. torch_tensorrt ends an engine before each of them, and PyTorch runs the op. It
cannot take a flex_attention call that was kept, nor a graph that TensorRT cannot build: such a graph goes to Inductor,
as a whole.

Dynamo makes parameters and sizes inputs of a graph. TensorRT is faster where weights are constants, so parameters
become constants, and each call checks that they are still the same. torch_tensorrt takes no integers, so sizes are read
from tensors. A copy of the graph is changed, because others count on the order of the inputs of Dynamo's own graph.
"""

import copy
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn import Parameter

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.config import Options
from cudnn_flex_compile.inner import inductor
from cudnn_flex_compile.passes.read.call import example, find_calls

NAME = "torch_tensorrt"
# Options of torch_tensorrt. RAISES: an error where a build fails. Without it torch_tensorrt runs the graph eagerly, and
# Inductor is faster. IMMUTABLE: whether weights stay as they are; it is torch_tensorrt's default, too.
RAISES, IMMUTABLE = "pass_through_build_failures", "immutable_weights"

log = logging.getLogger("cudnn_flex_compile")


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter that is a constant of the engines: its position among the inputs, and its version then."""

    position: int
    tensor: "weakref.ref[torch.Tensor]"
    version: int


@dataclass(frozen=True, slots=True)
class Handover:
    """The graph that torch_tensorrt compiles.

    Attributes:
        module: the graph.
        kept: the positions of its inputs among those of Dynamo's graph.
        weights: the parameters that are constants of it.
    """

    module: GraphModule
    kept: list[int] = field(default_factory=list[int])
    weights: list[Weight] = field(default_factory=list[Weight])


def compile(graph_module: GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """The compiled graph. Raises ImportError without the package, ValueError where a gradient may be asked for, or for
    a `mode`.
    """
    if options.mode not in (None, "default"):
        raise ValueError(f"mode={options.mode!r} is an option of inductor; the inner backend is {NAME!r}")
    if _trains(graph_module.graph):
        raise ValueError(
            f"inner_backend={NAME!r} is for inference, and this graph's outputs require gradients: run the model under "
            "torch.no_grad() or torch.inference_mode(), or train with inner_backend='inductor'"
        )
    backend = _backend()
    if next(find_calls(graph_module), None) is not None:
        log.warning("cudnn_flex: Inductor compiles a graph in TensorRT's place: a flex_attention call of it is kept")
        return inductor.compile(graph_module, example_inputs, Options())
    given = options.inner_options
    handed = _handover(graph_module, example_inputs, bool(given.get(IMMUTABLE, True)))
    try:
        compiled = backend(handed.module, [example_inputs[i] for i in handed.kept], options={RAISES: True, **given})
    except Exception as error:
        if given.get(RAISES):
            raise
        log.warning("cudnn_flex: Inductor compiles a graph in TensorRT's place: torch_tensorrt failed", exc_info=error)
        return inductor.compile(graph_module, example_inputs, Options())
    return _with_inputs_of_dynamo(compiled, handed.kept, handed.weights)


def _with_inputs_of_dynamo(
    compiled: Callable[..., Any], kept: Sequence[int], weights: Sequence[Weight]
) -> Callable[..., Any]:
    """Calls the compiled graph with its own inputs. Raises RuntimeError if a weight has changed."""

    def run(*inputs: Any) -> Any:
        for weight in weights:
            tensor = inputs[weight.position]
            if tensor is not weight.tensor() or torch_private.version_of(tensor) != weight.version:
                raise RuntimeError(
                    "cudnn_flex_compile: a weight was changed or replaced after TensorRT engines were built of it. "
                    "Call torch._dynamo.reset() to have them built anew, or let weights be inputs of the engines, "
                    f"which is slower: options={{'inner_options': {{'{IMMUTABLE}': False}}}}"
                )
        return compiled(*[inputs[i] for i in kept])

    return run


def _trains(graph: Graph) -> bool:
    (output,) = graph.find_nodes(op="output")
    values = [torch_private.example_of(node, None) for node in output.all_input_nodes]
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def _backend() -> Callable[..., Any]:
    try:
        import torch_tensorrt  # noqa: F401  # pyright: ignore
    except ImportError as error:
        raise ImportError(
            f"inner_backend={NAME!r} needs torch-tensorrt: pip install 'cudnn_flex_compile[tensorrt]'"
        ) from error
    except Exception as error:  # torch_tensorrt raises several kinds where it finds no TensorRT
        raise ImportError(f"inner_backend={NAME!r}: torch_tensorrt cannot be imported: {error}") from error
    return torch_private.lookup_backend()(NAME)


def _handover(graph_module: GraphModule, example_inputs: Sequence[Any], constants: bool) -> Handover:
    """Args: constants: whether parameters become constants of the graph."""
    handed = Handover(GraphModule(graph_module, copy.deepcopy(graph_module.graph)))
    graph = handed.module.graph
    inputs = graph.find_nodes(op="placeholder")
    sources, first = _sources(inputs), inputs[-1].next if inputs else None
    for position, (node, value) in enumerate(zip(inputs, example_inputs, strict=True)):
        size = example(node)
        source = sources.get(torch_private.expression_of(size)) if isinstance(size, torch.SymInt) else None
        constant = constants and isinstance(value, Parameter) and not value.is_inference()
        if source is None and not constant:
            handed.kept.append(position)
            continue
        with graph.inserting_before(first):
            if source is not None:
                found = graph.call_function(torch.ops.aten.sym_size.int, source)
            else:
                setattr(handed.module, f"weight_{position}", value)
                handed.weights.append(Weight(position, weakref.ref(value), torch_private.version_of(value)))
                found = graph.get_attr(f"weight_{position}")
        torch_private.set_example(found, size)
        node.replace_all_uses_with(found)
        graph.erase_node(node)
    handed.module.recompile()
    return handed


def _sources(inputs: Sequence[Node]) -> dict[Any, tuple[Node, int]]:
    """For each symbolic size that a tensor has, the tensor and the dimension."""
    found: dict[Any, tuple[Node, int]] = {}
    for node in inputs:
        tensor = example(node)
        for dim, size in enumerate(tensor.shape if isinstance(tensor, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt):
                found.setdefault(torch_private.expression_of(size), (node, dim))
    return found
