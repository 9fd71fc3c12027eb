"""Measures one row: both sides in one process, steps in turns, and whether their numbers agree.

launch.py launches the models, and result.py holds what is measured. A line on stderr says when each part began: the
last one tells where a row that was ended had got to.
"""

import copy
import dataclasses
import itertools
import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.bench.rows.launch import OURS, STOCK, Side, block_masks, launched
from cudnn_flex_compile.bench.rows.layers import Model, of_transformers
from cudnn_flex_compile.bench.rows.result import Measured, Result
from cudnn_flex_compile.bench.rows.row import WHOLE, Data, Row
from cudnn_flex_compile.bench.turns import Alone
from cudnn_flex_compile.report.report import Report, collect

WARM_UP, IN_A_ROW, PROFILED = 3, 2, 2  # steps; in training nobody waits for a step
DRAWN, SHOWN = 12, 12  # steps whose masks differ; kernels that are listed
# Kernels of attention by their names: templates of Inductor (a GEMM is none unless it is tuned), cuDNN's graphs, and
# the kernels of cudnn.flex_attention.
ATTENTION = re.compile(r"triton_tem|flex|cudnn|sdpa|fmha|kernel_cutlass", re.IGNORECASE)
NOT_ATTENTION = re.compile(r"conv|nvjet|gemm", re.IGNORECASE)
RATE = 1e-9  # the optimizer's learning rate, with which the sides' weights stay equal


class Contender:
    """A model as one side runs it."""

    def __init__(self, row: Row, model: nn.Module, side: Side, trains: bool) -> None:
        self.backend, self.model, self.trains = side, model, trains
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.SGD(self.named.values(), lr=RATE)
        self.run = launched(row, model, side)

    def step(self, x: Tensor, data: Data, grad: Tensor) -> dict[str, Tensor]:
        """Forward, and backward unless it is a CPU's; the output and the gradients."""
        with torch.set_grad_enabled(self.trains):
            out = self.run(x.detach().requires_grad_(self.trains), data)
        if self.trains:
            out.backward(grad)
            self.optimizer.step()
        found = {name: p.grad for name, p in self.named.items() if p.grad is not None}
        self.optimizer.zero_grad()
        return {"out": out.detach(), **found}


@dataclass(slots=True)
class Bench:
    """A row on a device, with its inputs. options: of the backend. trains: not on a CPU, where stock can't."""

    row: Row
    layers: int
    device: str
    options: dict[str, Any]
    trains: bool

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        with torch.device(self.device):
            found = of_transformers(self.row, self.layers) or Model(self.row, self.layers)
            return found.to(torch.bfloat16)

    def inputs(self, seed: int, row: Row | None = None) -> tuple[Tensor, Data, Tensor]:
        """x, the data that the masks of a step read, and a gradient of the output."""
        row = row or self.row
        data = row.draw(row, random.Random(0 if row.static else seed))
        torch.manual_seed(seed)
        size = (row.batch, row.length, row.dim)
        x, grad = (torch.randn(size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return x, {name: t.to(self.device) for name, t in data.items()}, grad

    def before(self) -> Iterator[tuple[Tensor, Data, Tensor]]:
        """Inputs of other sizes that come first, if there are any."""
        if self.row.before is not None:
            batch, length = self.row.before
            yield self.inputs(1000, dataclasses.replace(self.row, batch=batch, length=length))


def measure(bench: Bench, steps: int, alone: Alone = nullcontext) -> Result:
    """Compiles, compares, and within `alone` measures so many steps of each side, none where `steps` is 0."""
    _note("the models")
    torch_private.allow_recompiles(64)  # both sides compile the same code
    model, speed = bench.model(), bench.device != "cpu"
    whose = "" if isinstance(model, Model) else "transformers"
    sides = [Side(STOCK, {}, speed), Side(OURS, bench.options, speed)]
    models = copy.deepcopy(model), model
    contenders = [Contender(bench.row, own, side, bench.trains) for own, side in zip(models, sides, strict=True)]
    result = Result(bench.row.name, whose, {side.name: Measured() for side in sides})
    _note("the making of BlockMasks")
    _begin(bench)
    with collect() as report:
        for inputs in (*bench.before(), bench.inputs(0)):
            _compare(result, [_first(result, each, inputs) for each in contenders])
        if bench.device != "cpu":
            torch.cuda.empty_cache()  # for others, which compile
        _note("its turn to measure")
        with alone():
            _note("steps")
            _steps(bench, contenders, result, steps)
    _tell(result, report)
    return result


def _begin(bench: Bench) -> None:
    """Runs work that neither side shall pay for: the first use of the device and of Inductor, and compiling the making
    of BlockMasks.
    """
    torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=bench.device))
    for x, data, _ in (*bench.before(), bench.inputs(0)) if bench.row.form != WHOLE else ():
        block_masks(bench.row, x, data)


def _first(result: Result, contender: Contender, inputs: tuple[Tensor, Data, Tensor]) -> dict[str, Tensor]:
    _note(f"the first step by {contender.backend.name}")
    with contender.backend.compiling():
        start = time.perf_counter()
        found = contender.step(*inputs)
        _wait(inputs[0])
        result.sides[contender.backend.name].first += time.perf_counter() - start
    return found


def _compare(result: Result, found: list[dict[str, Tensor]]) -> None:
    """Compares outputs, and the gradients of each module's weights together: that of a bias of keys, which moves all
    scores of a row alike, is nothing but rounding.
    """
    parts: dict[str, list[str]] = {}
    for name in found[0]:
        parts.setdefault(name.rpartition(".")[0], []).append(name)
    for part, names in parts.items():
        off = relative(*([tensors[name] for name in names] for tensors in reversed(found)))
        if "out" in names:
            result.out = max(result.out, off)
        elif off > result.gradient:
            result.gradient, result.worst = off, part


def relative(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The relative difference in L2; beside zeros, the norm of the other one."""
    size = _norm(wanted)
    return _norm([f.float() - w.float() for f, w in zip(found, wanted, strict=True)]) / (size or 1.0)


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.hypot(*(float(t.float().norm()) for t in tensors))


def _steps(bench: Bench, contenders: list[Contender], result: Result, steps: int) -> None:
    if not steps:
        return
    x, _, grad = bench.inputs(0)
    drawn = itertools.cycle([bench.inputs(seed)[1] for seed in range(1, 1 + DRAWN)])
    for repeat in range(-WARM_UP, steps):
        samples = [next(drawn) for _ in range(IN_A_ROW if repeat >= 0 else 1)]
        for each in contenders:
            with each.backend.compiling():
                taken = _timed(lambda each=each: [each.step(x, data, grad) for data in samples][-1], x)
            if repeat >= 0:
                result.sides[each.backend.name].steps.append(taken / IN_A_ROW)
    for each in contenders:
        with each.backend.compiling():
            _look_at(result.sides[each.backend.name], lambda each=each: each.step(x, next(drawn), grad), x)
    data, found = next(drawn), []
    for each in contenders:
        with each.backend.compiling():
            found.append(each.step(x, data, grad))
    _compare(result, found)


def _timed(run: Callable[[], Any], x: Tensor) -> float:
    """The milliseconds of a run by the device's clock."""
    if not x.is_cuda:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _wait(x)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _look_at(measured: Measured, step: Callable[[], Any], x: Tensor) -> None:
    """Measures the memory and the kernels of a step."""
    if not x.is_cuda:
        return
    _wait(x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    _wait(x)
    measured.memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(PROFILED):
            step()
        _wait(x)
    times: Counter[str] = Counter()
    for event in profiled.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.key] += event.self_device_time_total / 1e3 / PROFILED
    measured.busy = sum(times.values())
    measured.attention = sum(taken for name, taken in times.items() if is_attention(name))
    measured.kernels = dict(times.most_common(SHOWN))


def is_attention(kernel: str) -> bool:
    """Whether a kernel is attention's, by its name."""
    return bool(ATTENTION.search(kernel)) and not NOT_ATTENTION.search(kernel)


def _tell(result: Result, report: Report) -> None:
    result.lowered = len(report.lowered)
    result.strategies = sorted({" + ".join(call.strategies) for call in report.lowered})
    result.kept = dict(Counter(str(call.reason) for call in report.kept))


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def _note(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)
