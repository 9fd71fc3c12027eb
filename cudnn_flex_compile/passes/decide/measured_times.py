"""Measures the kernels of a call: of our certified plans, and Inductor's for the same program and BlockMask.

chooser.py asks for times that predictions can't tell apart. They are kept beyond the process, by everything that they
depend on, so that no process measures what another one has. A measurement that fails gives no times, and never an
error.
"""

import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata

import torch

from cudnn_flex_compile.engine.certify.reference import ProgramReference
from cudnn_flex_compile.engine.choose import Values, run_of
from cudnn_flex_compile.engine.key import Key, problem_of
from cudnn_flex_compile.engine.launch import timing
from cudnn_flex_compile.engine.plans.plan import Plan
from cudnn_flex_compile.engine.problem import BACKWARD, problem_text
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.store.identity import environment
from cudnn_flex_compile.engine.store.plan_cache import CachedPlan
from cudnn_flex_compile.engine.store.texts import keep_text, recall_text
from cudnn_flex_compile.engine.worker import run_clean
from cudnn_flex_compile.kernels.inductor_timer import Contest, compiling
from cudnn_flex_compile.passes.decide.candidate import Candidate, backward_call, forward_call
from cudnn_flex_compile.passes.decide.chooser import STOCK, Measured, Way, name_of
from cudnn_flex_compile.passes.decide.cost_inputs import Blocks
from cudnn_flex_compile.passes.read.call import example, hint
from cudnn_flex_compile.phases import phase

log = logging.getLogger("cudnn_flex_compile")
clock = time.monotonic
CONTEXT = 2 * 2**30  # bytes of the device that another process takes besides its tensors
COPIES = 6  # and how many times queries, keys and values: outputs, gradients, and what kernels need
STEPS = 4  # shares of listed blocks are alike that are within a fourth of a power of two
FAILED: tuple[float, ...] = ()  # remembered in the process, so that a failure takes its time once


@dataclass(slots=True)
class Budget:
    """The seconds that one compile may yet spend on measuring."""

    left: float


@dataclass(frozen=True, slots=True)
class Measuring:
    """Measures the contenders of one call.

    Attributes:
        candidates: the call by each way of ours.
        ready: finds the plans of a way, and says whether they are there.
        values: gives the values of a way's program in the call that is being compiled; None if they are not at hand.
        blocks: the share of blocks that its BlockMask lists; None without one.
        budget: what it may spend.
    """

    candidates: dict[Way, Candidate]
    ready: Callable[[Way], bool]
    values: Callable[[Way], Values | None]
    blocks: Blocks | None
    budget: Budget

    def __call__(self, ways: Sequence[Way]) -> Measured:
        """The times of these contenders, measured now or before; of none that cannot be measured. Finding the plans of
        the first one is outside of the budget, because they are looked for in any case.
        """
        try:
            contest = _contest_of(self.candidates[()])
            keys = {way: self._key(way, contest) for way in ways}
            found = {way: times for way in ways if (times := _recalled(keys[way])) is not None}
            missing = [way for way in ways if way not in found]
            if missing and self.budget.left > 0:
                self._time(missing, ways[0], contest, found)
                for way in missing:
                    _remember(keys[way], found.setdefault(way, FAILED))
            return {way: times for way, times in found.items() if times != FAILED}
        except Exception:  # predictions decide
            log.info("cudnn_flex: the contenders of a call could not be measured", exc_info=True)
            return {}

    def _time(self, ways: Sequence[Way], first: Way, contest: Contest, found: Measured) -> None:
        """Times contenders, as far as the budget goes. Inductor's kernel is compiled while plans are found."""
        start, paid = clock(), 0.0
        mine = [way for way in ways if way != STOCK]
        try:
            _require_room(contest)
            with phase("measure"), compiling(contest) if STOCK in ways else nullcontext() as stock:
                there: list[Way] = []
                for way in mine:
                    before = clock()
                    if before - start - paid < self.budget.left and self.ready(way):
                        there.append(way)
                    paid += clock() - before if way == first else 0.0
                if there:
                    found.update(zip(there, self._ours(there), strict=True))
                if stock is not None:
                    found[STOCK] = stock(max(self.budget.left - (clock() - start - paid), 0.0))
        except Exception as error:
            log.info("cudnn_flex: %s could not be measured: %s", ", ".join(map(name_of, ways)), error)
        finally:
            self.budget.left -= clock() - start - paid

    def _ours(self, ways: Sequence[Way]) -> list[tuple[float, ...]]:
        """The times of plans, by direction, for each way."""
        plans = [[_plan_of(key) for key in self._calls(way)] for way in ways]
        device, values = plans[0][0].problem.device, list(map(self.values, ways))

        def timed() -> list[float]:
            references = [ProgramReference(of_way[0].problem.program) for of_way in plans]
            runs = [
                run_of(plan, of_way[0], reference, given)
                for of_way, reference, given in zip(plans, references, values, strict=True) for plan in of_way
            ]  # fmt: skip
            return timing.milliseconds(runs)

        times = run_clean(timed, device)
        size = len(plans[0])
        return [tuple(times[size * i : size * (i + 1)]) for i in range(len(ways))]

    def _calls(self, way: Way) -> list[Key]:
        """The keys of the plans of a way."""
        candidate = self.candidates[way]
        forward = forward_call(candidate, candidate.running, example(candidate.call.query).device)
        if not candidate.training:
            return [forward]
        tiled = candidate.mask_heads if BACKWARD in candidate.tiled else 0
        return [forward, backward_call(forward, tiled, candidate.lse_gradient)]

    def _key(self, way: Way, contest: Contest) -> str:
        """A text of everything that the time of a contender depends on."""
        listed = [f"{n:.3f}" if n == 0 else round(STEPS * math.log2(n)) for n in self.blocks or ()]
        lines = [
            "kernel times", name_of(way), *environment(contest.problem.device), f"triton {_triton()}",
            f"blocks {listed} of {contest.block_sizes}", f"training {contest.training} {contest.lse_gradient}",
        ]  # fmt: skip
        if way == STOCK:
            return "\n".join([*lines, problem_text(contest.problem)])
        candidate = self.candidates[way]
        problems = [problem_text(problem_of(call)) for call in self._calls(way)]
        return "\n".join([*lines, candidate.policy, f"reference {candidate.fingerprint}", *problems])


def measurable(candidate: Candidate, values_known: bool) -> bool:
    """Whether the contenders of a call can be measured: on a GPU, in one process alone, with its BlockMask at hand and
    all that its mask reads, and without gradients of captured tensors, which Inductor's timer doesn't take.

    The ranks of a job measure nothing: each would find times of its own, and all would wait for the slowest choice.
    """
    there = all(isinstance(candidate.real.get(block), torch.Tensor) for block in _blocks(candidate))
    on_gpu = example(candidate.call.query).device.type == "cuda"
    learned = any(part.learned for part in candidate.hoisted)
    return on_gpu and there and values_known and not learned and not several_ranks()


def several_ranks() -> bool:
    """Whether this process is one of several ranks of a job."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size() > 1
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def _blocks(candidate: Candidate) -> list[torch.fx.Node]:
    return [block for block in candidate.call.blocks[:4] if block is not None]


def _contest_of(candidate: Candidate) -> Contest:
    call = candidate.call
    device = example(call.query).device
    problem = problem_of(forward_call(candidate, (candidate.program, candidate.hoisted), device))
    blocks = tuple(None if block is None else candidate.real[block].cpu() for block in call.blocks[:4])
    rows, columns = (hint(example(n)) for n in call.block_sizes) if blocks else (0, 0)
    return Contest(problem, candidate.training, candidate.lse_gradient, blocks, (rows, columns))


def _require_room(contest: Contest) -> None:
    """Raises RuntimeError where the device has no memory for another process, and for what it computes."""
    problem = contest.problem
    specs = (problem.query, problem.key, problem.value)
    needed = CONTEXT + COPIES * sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)
    free, _ = torch.cuda.mem_get_info(problem.device)
    if free < needed:
        raise RuntimeError(f"the device has {free >> 20} MiB left, {needed >> 20} MiB are wanted for another process")


def _plan_of(key: Key) -> Plan:
    found = engine.plans.peek(key)
    if not isinstance(found, CachedPlan):
        raise RuntimeError(f"a plan was dropped before it was timed: {found}")
    return found.plan


@functools.cache
def _triton() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


def _recalled(key: str) -> tuple[float, ...] | None:
    known = engine.times.get(key)
    stored = recall_text(key) if known is None else None
    return known if stored is None else engine.times.put(key, tuple(json.loads(stored)))


def _remember(key: str, times: tuple[float, ...]) -> None:
    engine.times.put(key, times)
    if times != FAILED:
        keep_text(key, json.dumps(times))
