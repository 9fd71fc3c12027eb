"""cuDNN handles: one per device and thread, set to torch's current stream.

Knows nothing of graphs.
"""

import threading
from typing import Any

import cudnn
import torch

_local = threading.local()


def current_handle(device: int) -> Any:
    """This thread's handle for the device, which must be the current one, on torch's current stream."""
    handles: dict[int, Any] = _local.__dict__.setdefault("handles", {})
    handle = handles.get(device)
    if handle is None:
        handle = handles[device] = cudnn.create_handle()
    cudnn.set_stream(handle, torch._C._cuda_getCurrentRawStream(device))
    return handle
