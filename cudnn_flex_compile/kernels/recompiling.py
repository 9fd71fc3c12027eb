"""`Recompiling` is a function that torch compiles for all inputs, however often their sizes change."""

import hashlib
import types
from collections.abc import Callable
from typing import Any

import torch

from cudnn_flex_compile import inductor_seam, torch_private


class Recompiling:
    """The function in one graph. Sizes that change become symbolic.

    Dynamo compiles one piece of code eight times (torch._dynamo.config.recompile_limit), and then raises an error where
    one graph is asked for. At this limit the function gets a copy of its code, and older compilations are dropped. A
    copy also keeps apart compilations of the same function elsewhere.

    Dynamo remembers which numbers changed between two compilations, by the name of the code, which copies share. Such
    numbers become symbolic, and flex_attention fails with a symbolic float (torch 2.11 to 2.13:
    PendingUnbackedSymbolNotFound). So each purpose has a name of its own.

    Args:
        function: the function that is compiled.
        purpose: a text that sets this use of the function apart: numbers that differ between two uses are constants of
            each.
    """

    def __init__(self, function: types.FunctionType, purpose: str) -> None:
        self._function = function
        self._name = f"{function.__name__}_{hashlib.sha256(purpose.encode()).hexdigest()[:16]}"
        self._compiled = self._anew()

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self._compiled(*arguments)
        except torch_private.recompile_limit():
            self._compiled = self._anew()
            return self._compiled(*arguments)

    def _anew(self) -> Callable[..., Any]:
        given = self._function
        copy = types.FunctionType(given.__code__.replace(co_name=self._name), given.__globals__, self._name)
        return torch.compile(copy, fullgraph=True, options=inductor_seam.STOCK)
