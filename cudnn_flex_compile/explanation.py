"""`explain` shows how the backend lowers a model: it compiles the model and runs it once, in a state of its own.

It calls torch.compile and collects the report; report/render.py lays it out.
"""

import inspect
import itertools
import types
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import GraphModule

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.config import options_from
from cudnn_flex_compile.report.report import Report, collect

_fresh_names = (f"explain_{i}" for i in itertools.count())


def explain(
    model: Callable[..., Any], /, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Reports how the backend lowers the flex_attention calls of `model(*args, **kwargs)`, or why it keeps them.

    It compiles and runs the model once, as if it had never been compiled; code that is compiled already stays so.
    Gradients are planned for if the model runs with grad mode on and parameters or inputs that require it.

    Args:
        model: a module or a function.
        options: the backend's options, see Options.

    Returns:
        The report: `print` it, or read `report.lowered`, `report.kept`, `report.to_dict()`.

    Raises:
        ValueError, TypeError: an unknown option, or a value that it does not take.
        Whatever the model raises.
    """
    options_from(options)
    from cudnn_flex_compile.backend import cudnn_flex
    from cudnn_flex_compile.outside import listening

    def backend(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return cudnn_flex(graph_module, example_inputs, options=options)

    alone = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    with collect() as report, listening(report.outside), _compiled_in_place_off(model):
        torch.compile(_never_compiled(model), backend=backend, **alone)(*args, **kwargs)  # pyright: ignore
    return report


def _never_compiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function with its own code object: Dynamo keeps compiled graphs and the sizes it saw by code object.
    """
    model = _without_compile(model)

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    code = call.__code__.replace(co_name=next(_fresh_names))
    return types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)


def _without_compile(model: Callable[..., Any]) -> Callable[..., Any]:
    """The argument of torch.compile, if `model` is its result; else the model."""
    if isinstance(model, types.FunctionType):
        return torch_private.original_function(model)
    return torch_private.original_of(model)


@contextmanager
def _compiled_in_place_off(model: Callable[..., Any]) -> Generator[None]:
    """Sets the graphs that `module.compile()` has compiled aside."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    calls = ((module, torch_private.compiled_call(module)) for module in modules)
    compiled = [(module, call) for module, call in calls if call is not None]
    for module, _ in compiled:
        torch_private.set_compiled_call(module, None)
    try:
        yield
    finally:
        for module, call in compiled:
            torch_private.set_compiled_call(module, call)
