"""Inductor, with the mode and options that torch.compile would have given it.

Knows nothing of attention.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from cudnn_flex_compile.config import Options

NAME = "inductor"


def compile(graph_module: GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches: dict[str, Any] = {}
    if options.mode not in (None, "default"):
        patches |= list_mode_options(options.mode)
    patches |= dict(options.inner_options)
    return compile_fx(graph_module, list(example_inputs), config_patches=patches or None)  # pyright: ignore
