"""`Report` holds the records of all flex_attention calls of some graphs; logs, `explain` and tests read it.

The pass publishes records here, and `collect` gathers them. render.py lays a report out for people.
"""

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.locks import new_lock
from cudnn_flex_compile.phases import Tally, count, listen
from cudnn_flex_compile.report.call import CallReport, Outside

# graphs: compiled by this backend; recompiles: those of code that torch had compiled before, for other inputs.
# programs traced, programs shared: calls whose functions were traced, or are the same as those of an earlier call.
# plans found: look-ups of a plan, while compiling, that this process had. restored: verdicts from the cache folder.
# builds, certifications, rejections: plans built, checked, and found wrong.
COUNTS = (
    "graphs", "recompiles", "programs traced", "programs shared", "plans found", "restored", "builds",
    "certifications", "rejections",
)  # fmt: skip
# lower: our whole pass, with the next phases as far as they happen while compiling, but inner. trace: from functions to
# expressions; solve: masks, and the division of programs; restore, keep: verdicts in the cache folder; build, certify:
# plans; autotune: timing of all plans that are right; measure: timing of contenders, with finding their plans; inner:
# the inner backend. (Inductor's backward comes later, and is not in it.)
PHASES = ("lower", "trace", "solve", "restore", "build", "certify", "autotune", "measure", "keep", "inner")


@dataclass(slots=True, repr=False)
class Report:
    """All calls of the graphs that were compiled, in order. `print(report)` shows them.

    Attributes:
        calls: every flex_attention call.
        outside: calls that are in no graph of this backend, and how often each was compiled or ran; `explain` looks for
            them.
        tally: the counts and times of the whole process meanwhile.
    """

    calls: list[CallReport] = field(default_factory=list[CallReport])
    outside: Counter[Outside] = field(default_factory=Counter[Outside])
    tally: Tally = field(default_factory=Tally)

    @property
    def lowered(self) -> list[CallReport]:
        """The calls that run on cuDNN."""
        return [c for c in self.calls if c.reason is None]

    @property
    def kept(self) -> list[CallReport]:
        """The calls that the inner backend runs."""
        return [c for c in self.calls if c.reason is not None]

    @property
    def counts(self) -> dict[str, int]:
        """The number of times that each of COUNTS happened."""
        return {name: int(self.tally.counts.get(name, 0)) for name in COUNTS}

    @property
    def seconds(self) -> dict[str, float]:
        """The wall time of each of PHASES."""
        return {name: self.tally.seconds.get(name, 0.0) for name in PHASES}

    @property
    def summary(self) -> str:
        """The report in one line: `4 flex_attention calls: 3 lowered to cuDNN, 1 kept`."""
        calls = f"{len(self.calls)} flex_attention call{'' if len(self.calls) == 1 else 's'}"
        return f"{calls}: {len(self.lowered)} lowered to cuDNN, {len(self.kept)} kept"

    def to_dict(self) -> dict[str, Any]:
        """The whole report, as JSON takes it."""
        calls = [c.to_dict() for c in self.calls]
        counted = {"lowered": len(self.lowered), "kept": len(self.kept), "counts": self.counts}
        outside = [
            {"source": call.source, "ran": call.ran, "times": times, "remedy": call.remedy}
            for call, times in self.outside.items()
        ]
        return {**counted, "seconds": self.seconds, "calls": calls, "outside": outside}

    def assert_all_lowered(self) -> None:
        """For tests of models. Raises AssertionError, with the table, if a call was kept or there was none."""
        if self.kept or not self.calls:
            raise AssertionError(f"expected every flex_attention call to be lowered to cuDNN\n{self.overview}")

    def assert_plans_built(self, at_most: int, at_least: int = 0) -> None:
        """For tests of models. Raises AssertionError if cuDNN was asked to build more plans, or fewer.

        Plans that the process had already, or the cache folder, are not built.
        """
        self._assert_between("plans", "builds", at_least, at_most)

    def assert_certified(self, at_most: int, at_least: int = 0) -> None:
        """For tests of models. Raises AssertionError if more plans were checked, or fewer."""
        self._assert_between("certified plans", "certifications", at_least, at_most)

    def assert_no_recompiles(self) -> None:
        """For tests of models. Raises AssertionError if torch compiled a piece of code again for other inputs."""
        self._assert_between("recompiles", "recompiles", 0, 0)

    def _assert_between(self, what: str, name: str, least: int, most: int) -> None:
        found = self.counts[name]
        if not least <= found <= most:
            wanted = f"at most {most}" if found > most else f"at least {least}"
            raise AssertionError(f"expected {wanted} {what}, got {found}; counts: {self.counts}\n{self.overview}")

    @property
    def overview(self) -> str:
        """The tables of `print(report)`, without the details of each call."""
        from cudnn_flex_compile.report.render import to_text

        return to_text(self.calls, self.summary, self.outside, details=False)

    def plot(self, path: str | Path) -> int:
        """Draws the masks into a file, in the format that its name ends with, and returns the number of masks.

        It writes no file where there is none. Raises ImportError without matplotlib, ValueError for an unknown format.
        """
        from cudnn_flex_compile.report.plot import plot

        return plot(self.calls, Path(path))

    def __repr__(self) -> str:
        return f"<Report of {self.summary}>"

    def __str__(self) -> str:
        from cudnn_flex_compile.report.render import to_text

        return to_text(self.calls, self.summary, self.outside)

    def __rich__(self) -> Any:
        from cudnn_flex_compile.report.render import render

        return render(self.calls, self.summary, self.outside)


_collecting: list[Report] = []
_lock = new_lock()


@contextmanager
def collect() -> Generator[Report]:
    """Collects the reports of all graphs compiled within, in any thread."""
    report = Report()
    with _lock:
        _collecting.append(report)
    try:
        with listen(report.tally):
            yield report
    finally:
        with _lock:
            _collecting[:] = [r for r in _collecting if r is not report]


def collecting() -> bool:
    """Whether anybody collects reports."""
    return bool(_collecting)


def publish(calls: list[CallReport]) -> None:
    """Gives the records of one compiled graph to everyone who collects."""
    count("graphs")
    count("recompiles", int(torch_private.recompiles()))
    with _lock:
        for report in _collecting:
            report.calls.extend(calls)
