"""Inductor, with the mode and options that torch.compile would have given it.

Knows nothing of attention but the two ops that its code calls.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from cudnn_flex_compile.config import Options

NAME = "inductor"


def compile(graph_module: GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """The compiled graph, with `mode` and `inner_options` as Inductor's own configuration."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    _call_undispatched()
    patches: dict[str, Any] = {}
    if options.mode not in (None, "default"):
        patches |= list_mode_options(options.mode)
    patches |= dict(options.inner_options)
    return compile_fx(graph_module, list(example_inputs), config_patches=patches or None)  # pyright: ignore


@functools.cache
def _call_undispatched() -> None:
    """Has Inductor's Python code call the functions of ops/undispatched.py where it would call the ops."""
    from torch._inductor.lowering import add_needs_realized_inputs, register_lowering

    from cudnn_flex_compile.ops import attention_backward, attention_forward
    from cudnn_flex_compile.ops.undispatched import BACKWARD, FORWARD

    for op, function in ((attention_forward, FORWARD), (attention_backward, BACKWARD)):
        add_needs_realized_inputs(op)
        register_lowering(op, type_promotion_kind=None)(_lowering(op, f"torch.ops.cudnn_flex.{function}"))


def _lowering(op: Any, name: str) -> Callable[..., Any]:
    """As without a lowering, but for the name in the generated code."""
    from torch._inductor.ir import FallbackKernel
    from torch._inductor.lowering import fallback_handler
    from torch._inductor.virtualized import V

    def lower(*args: Any, **kwargs: Any) -> Any:
        outputs = fallback_handler(op, add_to_fallback_set=False)(*args, **kwargs)
        if not V.graph.cpp_wrapper and not getattr(V.graph, "fx_wrapper", False):
            mine = (o for o in V.graph.operations if isinstance(o, FallbackKernel) and o.op_overload is op)
            list(mine)[-1].python_kernel_name = name
        return outputs

    return lower
