"""torch_tensorrt, for inference: TensorRT engines of everything around attention.

Knows nothing of attention but the op that is not TensorRT's. TensorRT has no converter for our ops, so that
torch_tensorrt ends an engine before each and runs it by PyTorch; what it cannot have is a flex_attention call that was
kept, and what it cannot build: such a graph goes to Inductor, as a whole.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from cudnn_flex_compile.config import Options
from cudnn_flex_compile.inner import inductor
from cudnn_flex_compile.passes.find import example, find_calls

NAME = "torch_tensorrt"
RAISES = "pass_through_build_failures"
# Its options, where the user gives none. It shall fail rather than run a graph eagerly: Inductor is there. And small
# blocks shall be engines, too: those write dense tensors, whatever strides a graph was traced with, and a view of one
# that PyTorch runs could fail.
DEFAULTS = {RAISES: True, "min_block_size": 1}

log = logging.getLogger("cudnn_flex_compile")


def compile(graph_module: GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Raises ImportError without the package, ValueError where a gradient would be asked for, or for a mode."""
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
    handed, kept = _without_sizes(graph_module)
    given = options.inner_options
    try:
        compiled = backend(handed, [example_inputs[i] for i in kept], options={**DEFAULTS, **given})
    except Exception as error:
        if given.get(RAISES):
            raise
        log.warning("cudnn_flex: Inductor compiles a graph in TensorRT's place: torch_tensorrt failed", exc_info=error)
        return inductor.compile(graph_module, example_inputs, Options())
    return compiled if len(kept) == len(example_inputs) else lambda *inputs: compiled(*[inputs[i] for i in kept])


def _trains(graph: Graph) -> bool:
    (output,) = graph.find_nodes(op="output")
    values = [example(node) if "example_value" in node.meta else None for node in output.all_input_nodes]
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def _backend() -> Callable[..., Any]:
    from torch._dynamo.backends.registry import lookup_backend

    try:
        import torch_tensorrt  # noqa: F401  # pyright: ignore
    except ImportError as error:
        raise ImportError(
            f"inner_backend={NAME!r} needs torch-tensorrt: pip install 'cudnn_flex_compile[tensorrt]'"
        ) from error
    except Exception as error:  # what it raises where it finds no TensorRT
        raise ImportError(f"inner_backend={NAME!r}: torch_tensorrt cannot be imported: {error}") from error
    return lookup_backend(NAME)


def _without_sizes(graph_module: GraphModule) -> tuple[GraphModule, list[int]]:
    """A copy that takes tensors alone, and the positions of these among the inputs.

    torch_tensorrt takes no integers: a size that Dynamo made an input is read from a tensor of that size. It would do
    so in Dynamo's own graph, and whoever counts on the order of that graph's inputs would be wrong.
    """
    handed = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    inputs = handed.graph.find_nodes(op="placeholder")
    sources = {
        size.node.expr: (node, dim)
        for node in inputs if isinstance(example(node), torch.Tensor)
        for dim, size in enumerate(example(node).shape) if isinstance(size, torch.SymInt)
    }  # fmt: skip
    kept: list[int] = []
    for position, node in enumerate(inputs):
        size = example(node)
        source = sources.get(size.node.expr) if isinstance(size, torch.SymInt) else None
        if source is None:
            kept.append(position)
            continue
        _read_from(handed.graph, node, *source, after=inputs[-1])
        handed.graph.erase_node(node)
    handed.recompile()
    return handed, kept


def _read_from(graph: Graph, size: Node, tensor: Node, dim: int, after: Node) -> None:
    """Has the users of a size take it from a tensor."""
    if not size.users:
        return
    with graph.inserting_after(after):
        found = graph.call_function(torch.ops.aten.sym_size.int, (tensor, dim))
    found.meta["example_value"] = example(size)
    size.replace_all_uses_with(found)
