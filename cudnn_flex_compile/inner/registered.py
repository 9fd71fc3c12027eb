"""Compiles with any other backend that torch._dynamo knows, by its name. It gets the graph with our ops in it."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.config import Options


def compile(graph_module: GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """The compiled graph. Raises ValueError for an unknown name, or for an option that this backend does not take."""
    if options.inner_backend == "cudnn_flex":
        raise ValueError("inner_backend='cudnn_flex': the inner backend must be another one")
    if options.mode not in (None, "default"):
        raise ValueError(
            f"mode={options.mode!r} is an option of inductor; the inner backend is {options.inner_backend!r}"
        )
    try:
        backend: Callable[..., Any] = torch_private.lookup_backend()(options.inner_backend)
    except torch_private.invalid_backend():
        known = ", ".join(torch_private.list_backends()(exclude_tags=()))
        raise ValueError(f"inner_backend={options.inner_backend!r} is not known; known backends: {known}") from None
    keywords = {"options": dict(options.inner_options)} if options.inner_options else {}
    return backend(graph_module, list(example_inputs), **keywords)
