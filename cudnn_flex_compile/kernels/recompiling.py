"""A function that torch compiles for whatever inputs come, however often they change.

Knows nothing of what it computes.
"""

import hashlib
import types
from collections.abc import Callable
from typing import Any

import torch

from cudnn_flex_compile import inductor_seam, torch_private


class Recompiling:
    """The function in one graph. Sizes that change become symbolic.

    Dynamo compiles one piece of code eight times (torch._dynamo.config.recompile_limit), and then raises an error where
    one graph is asked for. Here it gets a copy of the code then, and what was compiled before goes. A copy also keeps
    apart what is compiled of the same function elsewhere.

    Dynamo remembers by the name of the code, which copies share, what numbers changed from one compilation to the next:
    they become symbolic, and flex_attention fails with a symbolic float (torch 2.11 to 2.13:
    PendingUnbackedSymbolNotFound). So each purpose has a name.

    Args:
        function: what is compiled.
        purpose: what sets this use of the function apart: numbers that differ between two uses are constants of each.
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
