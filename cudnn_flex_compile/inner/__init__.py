"""Inner backends compile everything but attention.

An inner backend is one file with NAME and `compile(graph_module, example_inputs, options) -> callable`; any
other name that torch._dynamo knows goes through registered.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from cudnn_flex_compile.config import Options
from cudnn_flex_compile.inner import direct, inductor, registered, torch_tensorrt

Compile = Callable[[GraphModule, Sequence[Any], Options], Callable[..., Any]]

BACKENDS: dict[str, Compile] = {inductor.NAME: inductor.compile, torch_tensorrt.NAME: torch_tensorrt.compile}


def compile_inner(graph_module: GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Compiles a graph with the inner backend of the options. Raises ValueError for a name that no backend has."""
    if direct.suffices(graph_module, example_inputs, options):
        return direct.compile(graph_module)
    return BACKENDS.get(options.inner_backend, registered.compile)(graph_module, example_inputs, options)
