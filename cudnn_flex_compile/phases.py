"""What happens while models compile, for whoever listens: how often, and for how many seconds.

Knows nothing of what is counted, nor of reports.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cudnn_flex_compile.locks import new_lock


@dataclass(slots=True)
class Tally:
    """What happened while it listened.

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
    """Adds to the tally what happens within, in any thread."""
    with _lock:
        _listening.append(tally)
    try:
        yield tally
    finally:
        with _lock:
            _listening[:] = [t for t in _listening if t is not tally]


def count(what: str, number: float = 1) -> None:
    """Something happened."""
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
