"""cuDNN handles: one per device and thread, set to the stream that it is asked for.

Plans ask for one at each launch. No handle is destroyed, which would wait for the device: when a thread ends, the next
new thread takes its handles over.
"""

import threading
from typing import Any

import cudnn

from cudnn_flex_compile import torch_private

Entry = tuple[Any, int | None]  # a handle, and the stream that it is set to, if any


class _Handles(threading.local):
    """This thread's handles, by device."""

    def __init__(self, free: dict[int, list[Entry]]) -> None:
        self.held = _Held(free)


class _Held(dict[int, Entry]):
    """Gives its entries to `free` when it is deleted together with its thread."""

    def __init__(self, free: dict[int, list[Entry]]) -> None:
        super().__init__()
        self.free = free

    def __del__(self) -> None:
        for device, entry in self.items():
            self.free.setdefault(device, []).append(entry)


_local = _Handles({})


def current_handle(device: int) -> Any:
    """This thread's handle for the device, which must be the current one, on torch's current stream."""
    return handle_on(device, torch_private.current_stream(device))


def handle_on(device: int, stream: int) -> Any:
    """This thread's handle for the device, which must be the current one, on a stream, until it is asked for again."""
    held = _local.held
    entry = held.get(device)
    if entry is None:
        entry = held[device] = _taken_over(held.free, device)
    handle, last = entry
    if last != stream:  # nobody else sets the stream of our handle
        cudnn.set_stream(handle, stream)
        held[device] = handle, stream
    return handle


def _taken_over(free: dict[int, list[Entry]], device: int) -> Entry:
    """A handle of a thread that has ended, or a new one."""
    try:
        return free[device].pop()
    except (KeyError, IndexError):
        return cudnn.create_handle(), None
