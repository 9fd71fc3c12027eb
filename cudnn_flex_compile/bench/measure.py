"""Times contenders side by side: interleaved samples, medians with their spread.

case.py makes the contenders. A sample is CUDA-event time around up to CALLS calls, and then one call of autograd for
all of them, as in a model of so many layers, divided by their number.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cudnn_flex_compile.bench.case import OURS, STOCK, Case, Function, Layer, first_calls
from cudnn_flex_compile.report.call import CallReport

FORWARD, BACKWARD, BOTH = PARTS = ("fwd", "bwd", "both")
CALLS, LONGEST, WARM_UP = 10, 30, 6  # at most; milliseconds of a sample; samples that do not count


@dataclass(frozen=True, slots=True)
class Time:
    """Milliseconds a call: the median of samples, and half the distance of their quartiles."""

    median: float
    spread: float

    @staticmethod
    def of(samples: list[float]) -> "Time":
        if len(samples) < 2:
            return Time(samples[0] if samples else math.nan, math.nan)
        low, median, high = statistics.quantiles(samples, n=4)
        return Time(median, (high - low) / 2)


@dataclass(frozen=True, slots=True)
class Result:
    """times: by contender and part."""

    case: Case
    call: CallReport
    times: dict[tuple[str, str], Time]

    @property
    def contenders(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.times))

    @property
    def how(self) -> str:
        """The strategies of forward and backward, or why the call was kept."""
        return f"kept: {self.call.reason}" if self.call.reason else " + ".join(self.call.strategies)

    def ratio(self, part: str, other: str = STOCK) -> float:
        """The other's time / ours."""
        return self.times[other, part].median / self.times[OURS, part].median


Clock = Callable[[Callable[[], Any]], tuple[float, Any]]


def on_device(run: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of a run by CUDA events, and its result."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end), result


def on_host(run: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of a run on the CPU, and its result."""
    start = time.perf_counter()
    result = run()
    return (time.perf_counter() - start) * 1e3, result


def forward(function: Function, layers: list[Layer]) -> list[torch.Tensor]:
    torch.compiler.cudagraph_mark_step_begin()
    return [function(*layer.qkv) for layer in layers]


def backward(outs: list[torch.Tensor], layers: list[Layer]) -> None:
    torch.autograd.grad(outs, [t for layer in layers for t in layer.qkv], [layer.grad for layer in layers])


def step(function: Function, layers: list[Layer]) -> None:
    backward(forward(function, layers), layers)


def measure(
    case: Case, repeats: int, mode: str | None = None, with_sdpa: bool = True, clock: Clock = on_device
) -> Result:
    """Compiles and times a case; the contenders take turns.

    Args:
        repeats: samples that count.
        mode: torch.compile's mode. Under "reduce-overhead" an output is overwritten by the next call's, so that a
            sample is one call, forward and backward.
    """
    functions = case.functions(mode, with_sdpa)
    call = first_calls(case, functions, step)
    graphs = mode == "reduce-overhead"
    return Result(case, call, times_of(case, functions, repeats, (BOTH,) if graphs else PARTS, clock, graphs))


def times_of(
    case: Case, functions: dict[str, Function], repeats: int, parts: Sequence[str], clock: Clock = on_device,
    single: bool = False,
) -> dict[tuple[str, str], Time]:  # fmt: skip
    """The times of compiled functions, by name and part; they take turns. `single`: whether a sample is one call."""
    samples: dict[tuple[str, str], list[float]] = {}
    layers = [case.layer()]
    for repeat in range(WARM_UP + repeats):
        longest = 0.0
        for name, function in functions.items():
            taken = _sample(function, layers, parts, clock)
            longest = max(longest, taken[parts[-1]])
            for part, value in taken.items() if repeat >= WARM_UP else ():
                samples.setdefault((name, part), []).append(value / len(layers))
        if repeat == WARM_UP - 3 and not single:
            layers = [case.layer() for _ in range(max(1, min(CALLS, round(LONGEST / max(longest, 1e-6)))))]
    return {key: Time.of(values) for key, values in samples.items()}


def _sample(function: Function, layers: list[Layer], parts: Sequence[str], clock: Clock) -> dict[str, float]:
    taken: dict[str, float] = {}
    if FORWARD in parts:
        taken[FORWARD], outs = clock(lambda: forward(function, layers))
        if BACKWARD in parts:
            taken[BACKWARD], _ = clock(lambda: backward(outs, layers))
    if BOTH in parts:
        taken[BOTH], _ = clock(lambda: step(function, layers))
    return taken


def mean(results: list[Result], part: str) -> float:
    """The geometric mean of the ratios to Inductor."""
    return math.exp(statistics.fmean(math.log(result.ratio(part)) for result in results))
