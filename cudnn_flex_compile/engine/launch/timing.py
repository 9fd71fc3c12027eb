"""Measures the device time of functions that enqueue work, each in turn. Choices among plans are made by it."""

from collections.abc import Callable, Sequence

import torch

from cudnn_flex_compile import torch_private

ROUNDS, CALLS = 7, 5  # samples of each contender that count, and calls in a sample
AHEAD = 10_000_000  # clock cycles (about 5 ms) that the device sleeps first, so that it waits for no host afterwards


def milliseconds(contenders: Sequence[Callable[[], object]]) -> list[float]:
    """The time of one call of each contender on the current stream, without host time: the least of the rounds, for
    work of other processes on the device only adds to it.
    """
    samples: list[list[float]] = [[] for _ in contenders]
    for _ in range(ROUNDS + 1):  # the first warms up
        for run, taken in zip(contenders, samples, strict=True):
            taken.append(_sample(run))
    return [min(taken[1:]) for taken in samples]


def _sample(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch_private.sleep(AHEAD)
    start.record()
    for _ in range(CALLS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / CALLS
