"""Lets the host read numbers of the device without waiting for work that is enqueued after them."""

from typing import Any

import torch
from torch import Tensor


class AsyncRead:
    """Numbers that are on their way to the host."""

    def __init__(self, numbers: Tensor) -> None:
        self._host, self._there = numbers, None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def __call__(self) -> Any:
        """The number, or the list of numbers. Waits until they are there."""
        if self._there is not None:
            self._there.synchronize()
        return self._host.tolist()
