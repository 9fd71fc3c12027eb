"""Runs a function free of the caller's torch state: modes, autograd exclusions, autocast, inference mode.

find_plan.py builds and certifies plans by it. A compile happens under Dynamo's modes, and a kernel runs below autograd;
a plan must be certified under neither. All of that state belongs to a thread, so a new thread has none of it.
"""

import os
import warnings
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from cudnn_flex_compile import torch_private

Result = TypeVar("Result")

_workers: dict[int, ThreadPoolExecutor] = {}


def run_clean(function: Callable[[], Result], device: int) -> Result:
    """The function's result (or exception), from our thread, on the caller's stream of the device."""
    stream = torch.cuda.current_stream(device)

    def body() -> Result:
        with torch.cuda.device(device), torch.cuda.stream(stream), any_algorithm():
            return function()

    worker = _workers.get(os.getpid())  # threads do not survive a fork
    if worker is None:
        worker = _workers[os.getpid()] = ThreadPoolExecutor(1, "cudnn_flex_compile")
    return worker.submit(body).result()


@contextmanager
def any_algorithm() -> Generator[None]:
    """Lets ops run that torch.use_deterministic_algorithms(True) forbids: cuBLAS without CUBLAS_WORKSPACE_CONFIG.

    A certification compares by a tolerance, and none of its numbers reach the user. The mode belongs to the process, so
    it stays on (and plans stay deterministic, whichever thread asks), but it only warns meanwhile, and these warnings
    are dropped.
    """
    if not torch.are_deterministic_algorithms_enabled() or torch.is_deterministic_algorithms_warn_only_enabled():
        yield
        return
    torch_private.set_deterministic(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch_private.set_deterministic(True, warn_only=False)
