"""Inductor, with the mode and options that torch.compile would have given it.

The backend's default for everything but attention.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from cudnn_flex_compile import inductor_seam, torch_private
from cudnn_flex_compile.config import Options

NAME = "inductor"


def compile(graph_module: GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """The compiled graph, with `mode` and `inner_options` as Inductor's own configuration."""
    prepare()
    patches: dict[str, Any] = {}
    if options.mode not in (None, "default"):
        patches |= torch_private.mode_options(options.mode)
    patches |= dict(options.inner_options)
    with inductor_seam.stock():  # so that no pass of ours lowers the calls that were kept
        return torch_private.compile_fx()(graph_module, list(example_inputs), config_patches=patches or None)


@functools.cache
def prepare() -> None:
    """Makes Inductor's Python code call the functions of ops/undispatched.py from now on, in place of the ops."""
    from cudnn_flex_compile.ops import attention_backward, attention_forward, check_block_mask, list_tiles
    from cudnn_flex_compile.ops.undispatched import BACKWARD, CHECK, FORWARD, LIST

    functions = {attention_forward: FORWARD, attention_backward: BACKWARD, check_block_mask: CHECK, list_tiles: LIST}
    for op, function in functions.items():
        torch_private.call_from_inductor(op, f"torch.ops.cudnn_flex.{function}")
