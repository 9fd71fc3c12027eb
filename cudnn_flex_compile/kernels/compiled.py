"""A function that torch compiles for whatever inputs come, however often they change.

Knows nothing of what it computes.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit


class Compiled:
    """The function in one graph. Sizes that change become symbolic.

    Dynamo compiles one piece of code eight times (torch._dynamo.config.recompile_limit), and then raises an error where
    one graph is asked for. Here it gets a copy of the code then, and what was compiled before goes. A copy also keeps
    apart what is compiled of the same function elsewhere.
    """

    def __init__(self, function: types.FunctionType) -> None:
        self._function = function
        self._compiled = self._anew()

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self._compiled(*arguments)
        except FailOnRecompileLimitHit:
            self._compiled = self._anew()
            return self._compiled(*arguments)

    def _anew(self) -> Callable[..., Any]:
        given = self._function
        copy = types.FunctionType(given.__code__.replace(), given.__globals__, given.__name__)
        return torch.compile(copy, fullgraph=True)
