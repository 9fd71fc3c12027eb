"""Counts events and times phases while models compile, for everyone who listens.

Any module may call `count` and `phase`; reports listen. The names are listed in report/report.py.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cudnn_flex_compile.locks import new_lock


@dataclass(slots=True)
class Tally:
    """The events and phases that happened while it listened.

    Attributes:
        counts: events by name, such as "builds".
        seconds: by phase, such as "trace"; wall time of all threads together. A phase within another counts in both.
    """

    counts: dict[str, float] = field(default_factory=dict[str, float])
    seconds: dict[str, float] = field(default_factory=dict[str, float])


_listening: list[Tally] = []
_lock = new_lock()


@contextmanager
def listen(tally: Tally) -> Generator[Tally]:
    """Adds the events within the block to the tally, from any thread."""
    with _lock:
        _listening.append(tally)
    try:
        yield tally
    finally:
        with _lock:
            _listening[:] = [t for t in _listening if t is not tally]


def count(what: str, number: float = 1) -> None:
    """Adds to the count of an event, in every tally that listens."""
    with _lock:
        for tally in _listening:
            tally.counts[what] = tally.counts.get(what, 0) + number


@contextmanager
def phase(name: str) -> Generator[None]:
    """Adds the seconds that the block takes, also if it raises."""
    start = time.perf_counter()
    try:
        yield
    finally:
        elapsed = time.perf_counter() - start
        with _lock:
            for tally in _listening:
                tally.seconds[name] = tally.seconds.get(name, 0.0) + elapsed
