"""What was done with each flex_attention call: data that logs, `explain` and tests read.

Knows nothing of how it is shown (rendering.py).
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cudnn_flex_compile.locks import new_lock
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.scoremod.ir import Program
from cudnn_flex_compile.scoremod.text import infix, text


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

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it; what is not known is None."""
        program, reason = self.program, self.reason
        return {
            "source": self.source,
            "score": infix(program.score) if program else None,
            "mask": infix(program.mask) if program else None,
            "program": text(program) if program else None,
            "strategies": list(self.strategies),
            "reason": {"code": reason.code.name, "detail": reason.detail, "remedy": reason.remedy} if reason else None,
        }


@dataclass(slots=True, repr=False)
class Report:
    """All calls of the graphs that were compiled, in order. `print(report)` shows a table of them."""

    calls: list[CallReport] = field(default_factory=list[CallReport])

    @property
    def lowered(self) -> list[CallReport]:
        return [c for c in self.calls if c.reason is None]

    @property
    def kept(self) -> list[CallReport]:
        return [c for c in self.calls if c.reason is not None]

    @property
    def summary(self) -> str:
        calls = f"{len(self.calls)} flex_attention call{'' if len(self.calls) == 1 else 's'}"
        return f"{calls}: {len(self.lowered)} lowered to cuDNN, {len(self.kept)} kept"

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {"lowered": len(self.lowered), "kept": len(self.kept), "calls": [c.to_dict() for c in self.calls]}

    def assert_all_lowered(self) -> None:
        """For tests of models. Raises AssertionError, with the table, if a call was kept or there was none."""
        if self.kept or not self.calls:
            raise AssertionError(f"expected every flex_attention call to be lowered to cuDNN\n{self}")

    def __repr__(self) -> str:
        return f"<Report of {self.summary}>"

    def __str__(self) -> str:
        from cudnn_flex_compile.rendering import to_text

        return to_text(self)

    def __rich__(self) -> Any:
        from cudnn_flex_compile.rendering import render

        return render(self)


_collecting: list[Report] = []
_lock = new_lock()


@contextmanager
def collect() -> Generator[Report]:
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
