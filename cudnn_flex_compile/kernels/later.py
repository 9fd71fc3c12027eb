"""Lets the host look at numbers of the device when a compiled graph has enqueued all its work, and not before.

Whoever waits for the device in the middle of a graph leaves it idle afterwards. At the end of the graph the number has
long been there, or the device has enough to do.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_thread = threading.local()


class Reading:
    """Numbers of the device, read without waiting for what is enqueued after them."""

    def __init__(self, numbers: Tensor) -> None:
        self._host, self._there = numbers, None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def __call__(self) -> Any:
        """A number or a list of them."""
        if self._there is not None:
            self._there.synchronize()
        return self._host.tolist()


def later(look: Callable[[], None]) -> None:
    """Calls `look` at the end of the compiled graph that runs in this thread; at once if there is none."""
    looks: list[Callable[[], None]] | None = getattr(_thread, "looks", None)
    if looks is None:
        look()
    else:
        looks.append(look)


def looking_last(run: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled graph after which the host looks at what there is to look at: what that raises, it raises."""

    def run_and_look(*inputs: Any) -> Any:
        outer, _thread.looks = getattr(_thread, "looks", None), []
        try:
            result = run(*inputs)
            looks: list[Callable[[], None]] = _thread.looks
        finally:
            _thread.looks = outer
        for look in looks:
            look()
        return result

    return run_and_look
