"""Judges calls in worker processes: each gets another one when it is idle, and is replaced when it dies.

Knows nothing of what is judged, nor of CUDA.
"""

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from tests.fuzzing.verdict import DIED, ERROR, Verdict
from tests.support.generated import Call

START = 120  # seconds that a worker may take to start, beyond those for its first call


class Task(Protocol):
    """A call to judge, which the worker makes: that takes time, too."""

    def call(self) -> Call: ...


@dataclass(frozen=True)
class Done:
    task: Any
    verdict: Verdict
    seconds: float


@dataclass
class Worker:
    process: Any
    connection: Connection
    task: Any = None
    since: float = 0.0
    fresh: bool = True


class Pool:
    """Workers that judge tasks.

    Args:
        judge: of a Call, importable by name.
        workers: how many at most; each starts when it is first needed.
        timeout: seconds after which a worker is killed, and its task is DIED.
    """

    def __init__(self, judge: Callable[[Call], Verdict], workers: int, timeout: float = 180.0) -> None:
        self.judge, self.size, self.timeout = judge, workers, timeout
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[Worker] = []
        self.replaced = 0

    @property
    def idle(self) -> bool:
        """Whether `give` finds a worker."""
        return len(self._workers) < self.size or any(w.task is None for w in self._workers)

    @property
    def busy(self) -> bool:
        return any(w.task is not None for w in self._workers)

    def give(self, task: Task) -> None:
        worker = next((w for w in self._workers if w.task is None), None) or self._start()
        worker.task, worker.since = task, time.monotonic()
        with contextlib.suppress(OSError):  # it died in between: `done` finds that
            worker.connection.send(task)

    def done(self, seconds: float = 1.0) -> list[Done]:
        """What was judged, waiting for the first of it, and at most so long."""
        working = {w.connection: w for w in self._workers if w.task is not None}
        finished = [self._receive(working[c]) for c in wait(list(working), seconds)]  # pyright: ignore
        late = [w for w in working.values() if w.task is not None and w in self._workers and self._late(w)]
        return finished + [self._bury(w, f"no answer in {self.timeout:.0f} s") for w in late]

    def close(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
        self._workers.clear()

    def _start(self) -> Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs, self.judge, os.getpid()), daemon=True)
        process.start()
        theirs.close()
        self._workers.append(Worker(process, ours))
        return self._workers[-1]

    def _late(self, worker: Worker) -> bool:
        return time.monotonic() - worker.since > self.timeout + (START if worker.fresh else 0)

    def _receive(self, worker: Worker) -> Done:
        try:
            verdict, seconds = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(10)
            return self._bury(worker, f"the process ended, {_how(worker.process.exitcode)}")
        done = Done(worker.task, verdict, seconds)
        worker.task, worker.fresh = None, False
        if verdict.fatal:
            self._remove(worker)
        return done

    def _bury(self, worker: Worker, how: str) -> Done:
        done = Done(worker.task, Verdict(DIED, how), time.monotonic() - worker.since)
        self._remove(worker)
        return done

    def _remove(self, worker: Worker) -> None:
        self._workers.remove(worker)
        self.replaced += 1
        worker.process.kill()
        worker.process.join()


def _how(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"with exit code {code}"


def serve(connection: Connection, judge: Callable[[Call], Verdict], parent: int) -> None:
    """The body of a worker: judges until nobody asks any more. It has one core, and needs no workers of its own."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        start = time.monotonic()
        try:
            verdict = judge(task.call())
        except Exception:  # the judge itself, or the making of the call
            verdict = Verdict(ERROR, f"the judge failed: {traceback.format_exc(limit=-3).strip()}")
        connection.send((verdict, time.monotonic() - start))
        if verdict.fatal or os.getppid() != parent:
            return
