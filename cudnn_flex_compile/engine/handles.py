"""cuDNN handles: one per device and thread, set to the stream that it is asked for.

Knows nothing of graphs.
"""

import threading
from typing import Any

import cudnn
import torch

_local = threading.local()


def current_handle(device: int) -> Any:
    """This thread's handle for the device, which must be the current one, on torch's current stream."""
    return handle_on(device, torch._C._cuda_getCurrentRawStream(device))


def handle_on(device: int, stream: int) -> Any:
    """This thread's handle for the device, which must be the current one, on a stream, until it is asked for again."""
    streams: dict[int, tuple[Any, int]] = _local.__dict__.setdefault("handles", {})
    handle, last = streams.get(device, (None, None))
    if handle is None:
        handle = cudnn.create_handle()
    if last != stream:  # nobody else sets the stream of our handle
        cudnn.set_stream(handle, stream)
        streams[device] = handle, stream
    return handle
