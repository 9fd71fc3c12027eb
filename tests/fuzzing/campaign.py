"""Hands out calls by number until the time or the numbers are over, shrinks what fails, and counts.

Knows nothing of how calls are judged, nor of how results are shown.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzzing.cases import case as fuzzed
from tests.fuzzing.pool import Done, Pool
from tests.fuzzing.repro import write
from tests.fuzzing.shrink import shrink
from tests.fuzzing.verdict import KEPT, RIGHT, SKIPPED, WRONG, Verdict
from tests.support.generated import Call
from tests.support.generated import call as generated

SHRINKING = 240.0  # seconds, for one failure
MOST_SHRUNK = 12  # failures beyond that are written as they are


@dataclass(frozen=True)
class Numbered:
    """A call by number: of a seed, or without one of tests/support/generated.py."""

    number: int
    seed: int | None = None

    def call(self) -> Call:
        return generated(self.number) if self.seed is None else fuzzed(self.seed, self.number)

    @property
    def label(self) -> str:
        return f"generated_{self.number}" if self.seed is None else f"seed{self.seed}_{self.number}"


@dataclass(frozen=True)
class Attempt:
    """A simpler call than that of `origin`, to see whether it fails too."""

    origin: Numbered
    case: Call

    def call(self) -> Call:
        return self.case


@dataclass(frozen=True)
class Failure:
    """The simplest call found that fails as `origin` does, and its script."""

    origin: Numbered
    case: Call
    verdict: Verdict
    path: Path


@dataclass
class Outcome:
    """What a campaign found. calls: what became of each, and how many seconds it took its worker."""

    kinds: Counter[str] = field(default_factory=Counter[str])
    kept: Counter[str] = field(default_factory=Counter[str])
    strategies: Counter[str] = field(default_factory=Counter[str])
    failures: list[Failure] = field(default_factory=list[Failure])
    skipped: list[str] = field(default_factory=list[str])
    calls: dict[Numbered, tuple[Verdict, float]] = field(default_factory=dict[Numbered, tuple[Verdict, float]])
    replaced: int = 0
    elapsed: float = 0.0

    @property
    def programs(self) -> int:
        """The calls that were calls."""
        return self.kinds.total() - self.kinds[SKIPPED]

    @property
    def lowered(self) -> int:
        return self.kinds[RIGHT] + self.kinds[WRONG]

    def count(self, task: Numbered, verdict: Verdict, seconds: float) -> None:
        self.kinds[verdict.kind] += 1
        self.calls[task] = verdict, seconds
        if verdict.kind == KEPT:
            self.kept[verdict.reason] += 1
        if verdict.kind == SKIPPED:
            self.skipped.append(f"{task.label}: {verdict.detail}")
        if verdict.kind in (RIGHT, WRONG):
            self.strategies[" + ".join(verdict.strategies)] += 1


@dataclass
class Shrinking:
    """One failure while it is made simpler: `candidate` is the call to try next, or None when there is none.

    asked: whether a worker is at it.
    """

    origin: Numbered
    best: Call
    verdict: Verdict
    steps: Generator[Call, bool, Call]
    since: float = field(default_factory=time.monotonic)
    candidate: Call | None = None
    asked: bool = False

    def start(self) -> None:
        self.candidate = next(self.steps, None)

    def advance(self, verdict: Verdict) -> None:
        """After the candidate's verdict: one that fails in another way is another failure, not this one."""
        assert self.candidate is not None
        self.asked = False
        same = verdict.kind == self.verdict.kind
        if same:
            self.best, self.verdict = self.candidate, verdict
        try:
            self.candidate = self.steps.send(same)
        except StopIteration:
            self.candidate = None
        if time.monotonic() - self.since > SHRINKING:
            self.candidate = None


class Campaign:
    """Runs tasks on a pool.

    Args:
        pool: judges.
        tasks: to hand out, in order; may have no end.
        minutes: after these no further task is handed out; what has failed by then is still made simpler.
        out: folder of the scripts.
        say: gets one line for each failure, and one a minute.
    """

    def __init__(
        self, pool: Pool, tasks: Iterator[Numbered], minutes: float, out: Path, say: Callable[[str], None] = print
    ) -> None:
        self.pool, self.tasks, self.minutes, self.out, self.say = pool, tasks, minutes, out, say
        self.outcome = Outcome()
        self._shrinking: dict[Numbered, Shrinking] = {}
        self._begun = self._said = time.monotonic()

    def run(self) -> Outcome:
        try:
            while self._hand_out() or self.pool.busy:
                for done in self.pool.done():
                    self._take(done)
                self._report()
        finally:
            self.outcome.replaced = self.pool.replaced
            self.outcome.elapsed = time.monotonic() - self._begun
            self.pool.close()
        return self.outcome

    def _hand_out(self) -> bool:
        """Gives every idle worker something to do; whether it gave any."""
        given = False
        while self.pool.idle and (task := self._next()) is not None:
            self.pool.give(task)
            given = True
        return given

    def _next(self) -> Numbered | Attempt | None:
        for shrinking in self._shrinking.values():
            if shrinking.candidate is not None and not shrinking.asked:
                shrinking.asked = True
                return Attempt(shrinking.origin, shrinking.candidate)
        over = time.monotonic() - self._begun > 60 * self.minutes
        return None if over else next(self.tasks, None)

    def _take(self, done: Done) -> None:
        if isinstance(done.task, Attempt):
            shrinking = self._shrinking[done.task.origin]
            shrinking.advance(done.verdict)
            self._settle(shrinking)
            return
        self.outcome.count(done.task, done.verdict, done.seconds)
        if not done.verdict.failed:
            return
        case = done.task.call()
        self.say(f"{done.task.label}: {done.verdict.kind}, {done.verdict.detail}\n  {case}")
        few = len(self._shrinking) + len(self.outcome.failures) < MOST_SHRUNK
        shrinking = Shrinking(done.task, case, done.verdict, shrink(case) if few else shrink(case, 0))
        shrinking.start()
        self._shrinking[done.task] = shrinking
        self._settle(shrinking)

    def _settle(self, shrinking: Shrinking) -> None:
        """Writes the script once there is nothing simpler to try."""
        if shrinking.candidate is not None:
            return
        origin = shrinking.origin
        del self._shrinking[origin]
        found = f"Found as {origin.label} ({origin.call()})" if shrinking.best != origin.call() else origin.label
        path = write(self.out, shrinking.best, shrinking.verdict, found, origin.label)
        self.outcome.failures.append(Failure(origin, shrinking.best, shrinking.verdict, path))
        self.say(f"{origin.label}, made simpler: {shrinking.verdict.detail}\n  {shrinking.best}\n  {path}")

    def _report(self) -> None:
        if time.monotonic() - self._said > 60:
            self._said = time.monotonic()
            counts = ", ".join(f"{n} {kind}" for kind, n in self.outcome.kinds.most_common())
            self.say(f"after {self._said - self._begun:.0f} s: {counts}")


def numbered(seed: int | None, count: int | None) -> Iterator[Numbered]:
    """All numbers, or the first `count`."""
    return (Numbered(n, seed) for n in (itertools.count() if count is None else range(count)))
