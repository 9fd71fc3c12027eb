"""Compiles functions of tensors that run again and again on a GPU, such as comparisons of BlockMasks."""

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from cudnn_flex_compile import torch_private

log = logging.getLogger("cudnn_flex_compile")
EAGER = 2  # calls on a GPU that run eagerly, before more are expected


def _pays(tensor: Tensor) -> bool:
    return tensor.is_cuda and not torch.cuda.is_current_stream_capturing()


class HotFunction:
    """A function of tensors, without gradients, on a GPU by Inductor from its third call on.

    Compiling takes about a second, and saves the host some microseconds of every torch op. It is compiled for each
    layout of its inputs; a function that can't be compiled runs eagerly.

    Args:
        function: runs eagerly.
        traced: the same function in a form for the compiler, if it has one of its own.
        long: whether it takes so long eagerly that the first call shall be compiled.
    """

    def __init__(
        self, function: Callable[..., Tensor], traced: Callable[..., Tensor] | None = None, *, long: bool = False
    ) -> None:
        self._function, self._traced, self._eager = function, traced or function, 0 if long else EAGER
        self._calls = 0
        self._compiled: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, *tensors: Tensor) -> Tensor:
        self._calls += 1
        if self._calls <= self._eager or not _pays(tensors[0]):
            with torch.no_grad():
                return self._function(*tensors)
        return self.compiled(*tensors)(*tensors)

    def compiled(self, *tensors: Tensor) -> Callable[..., Tensor]:
        """The function for tensors of this layout and these dtypes, compiled now if it is not yet."""
        layout = tuple([(t.shape, t.stride(), t.dtype) for t in tensors])
        found = self._compiled.get(layout)
        if found is None:
            found = self._compiled[layout] = self._compile(tensors)
        return found

    def _compile(self, tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
        try:
            with torch.no_grad(), torch_private.without_dynamo():
                graph = make_fx(self._traced, tracing_mode="fake")(*tensors)
                compiled: Any = torch_private.compile_fx()(graph, list(tensors))
                compiled(*tensors)  # Inductor's kernels are made in the first call
        except Exception:
            log.debug("cudnn_flex: a function that is called at every step can't be compiled", exc_info=True)
            return self._function

        def run(*tensors: Tensor) -> Any:
            with torch.no_grad():
                return compiled(*tensors)

        return run
