"""cuDNN handles: one per device and thread, set to torch's current stream.

Knows nothing of graphs.
"""

import contextlib
import threading
from collections.abc import Generator
from typing import Any

import cudnn
import torch

_local = threading.local()


def current_handle(device: int) -> Any:
    """This thread's handle for the device, which must be the current one, on torch's current stream."""
    streams: dict[int, tuple[Any, int]] = _local.__dict__.setdefault("handles", {})
    stream = torch._C._cuda_getCurrentRawStream(device)
    handle, last = streams.get(device, (None, None))
    if handle is None:
        handle = cudnn.create_handle()
    if last != stream:  # nobody else sets the stream of our handle
        cudnn.set_stream(handle, stream)
        streams[device] = handle, stream
    return handle


@contextlib.contextmanager
def handle_on(device: int, stream: int) -> Generator[Any]:
    """This thread's handle for the device, which must be the current one, on another stream until the block ends."""
    handle = current_handle(device)
    cudnn.set_stream(handle, stream)
    try:
        yield handle
    finally:
        cudnn.set_stream(handle, torch._C._cuda_getCurrentRawStream(device))
