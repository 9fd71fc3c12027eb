"""Lets the host look at numbers of the device when that delays it least, and before anyone uses a gradient.

Whoever waits for the device in the middle of a graph leaves it idle afterwards. A graph without gradients looks at its
end. In training the host had better not wait there either: it looks when the backward is enqueued, by when the number
has long been there, and what a look raises, `backward()` raises.
"""

import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.locks import new_lock

log = logging.getLogger("cudnn_flex_compile")
MOST = 64  # looks that are put off


@dataclass(frozen=True, slots=True)
class Look:
    """What the host has to look at.

    Attributes:
        run: looks; raises what there is to raise.
        ready: whether it would not wait.
    """

    run: Callable[[], None]
    ready: Callable[[], bool]


_thread = threading.local()
_put_off: deque[Look] = deque()
_lock = new_lock()


class Reading:
    """Numbers of the device, read without waiting for what is enqueued after them."""

    def __init__(self, numbers: Tensor) -> None:
        self._host, self._there = numbers, None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def there(self) -> bool:
        return self._there is None or self._there.query()

    def __call__(self) -> Any:
        """A number or a list of them."""
        if self._there is not None:
            self._there.synchronize()
        return self._host.tolist()


def later(run: Callable[[], None], ready: Callable[[], bool]) -> None:
    """Calls `run` at the end of the compiled graph that runs in this thread, or of its backward; at once if there is
    no graph.

    Args:
        ready: whether `run` would not wait for the device.
    """
    looks: list[Look] | None = getattr(_thread, "looks", None)
    if looks is None:
        run()
    else:
        looks.append(Look(run, ready))


def looking_last(run: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled graph after which the host looks at what there is to look at: what that raises, it raises.

    Where the outputs have gradients, what is not there yet is left to their backward; should none follow, to later
    graphs.
    """

    def run_and_look(*inputs: Any) -> Any:
        outer, _thread.looks = getattr(_thread, "looks", None), []
        try:
            result = run(*inputs)
        finally:  # also of a graph that fails: what was compared is taken to agree
            _put_off.extend(_thread.looks)
            _thread.looks = outer
        _look(wait=False)
        if _put_off and not _left_to_backward(result):
            _look()
        return result

    return run_and_look


def _left_to_backward(result: Any) -> bool:
    """Whether the host looks when a backward is enqueued: the one that runs now, or that of any of these outputs."""
    if torch_private.graph_task is None or torch_private.engine is None:
        return False
    if torch_private.graph_task() >= 0:  # a graph that a checkpoint runs again
        _at_end_of_backward()
        return True
    if not torch.is_grad_enabled() or torch_private.traces_backwards():  # which would trace the hooks
        return False
    outputs = result if isinstance(result, tuple | list) else ()
    nodes = {t.grad_fn for t in outputs if isinstance(t, Tensor) and t.grad_fn is not None}
    for node in nodes:
        node.register_prehook(_at_end_of_backward)
    return bool(nodes)


def _at_end_of_backward(*_: Any) -> None:
    torch_private.engine.queue_callback(_look)


def _look(wait: bool = True) -> None:
    """At all that was put off, in order. What one raises leaves the rest for the next time."""
    while (look := _next(wait)) is not None:
        look.run()


def _next(wait: bool) -> Look | None:
    with _lock:
        due = _put_off and (wait or len(_put_off) > MOST or _put_off[0].ready())
        return _put_off.popleft() if due else None


@atexit.register
def _at_exit() -> None:
    try:
        _look()
    except Exception as error:
        log.error("%s", error)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_put_off.clear)  # a child has no part in its parent's CUDA context
