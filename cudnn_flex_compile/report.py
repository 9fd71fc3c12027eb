"""What was done with each flex_attention call: data that logs, `explain` and tests read.

Knows nothing of how it is shown (explain.py).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.scoremod.ir import Program


@dataclass(slots=True)
class CallReport:
    """One call.

    Attributes:
        source: where in the user's code it is.
        program: what it computes, once traced.
        strategies: of forward and backward, if lowered.
        reason: why it was kept; None if it was lowered.
    """

    source: str
    program: Program | None = None
    strategies: tuple[str, ...] = ()
    reason: Reason | None = None


@dataclass(slots=True)
class Report:
    """All calls of the graphs that were compiled, in order."""

    calls: list[CallReport] = field(default_factory=list[CallReport])

    @property
    def lowered(self) -> list[CallReport]:
        return [c for c in self.calls if c.reason is None]

    @property
    def kept(self) -> list[CallReport]:
        return [c for c in self.calls if c.reason is not None]


_collecting: list[Report] = []
_lock = threading.Lock()


@contextmanager
def collect() -> Iterator[Report]:
    """Collects the reports of all graphs compiled within, in any thread."""
    report = Report()
    with _lock:
        _collecting.append(report)
    try:
        yield report
    finally:
        with _lock:
            _collecting.remove(report)


def publish(calls: list[CallReport]) -> None:
    with _lock:
        for report in _collecting:
            report.calls.extend(calls)
