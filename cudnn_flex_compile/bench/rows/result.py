"""`Result` holds what a row takes by either side.

measure.py measures it, and show.py shows it. It goes between processes as JSON, and is kept as a row of a CSV file.
"""

import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cudnn_flex_compile.bench.rows.launch import SIDES
from cudnn_flex_compile.bench.rows.rows import ROWS


@dataclass(slots=True)
class Measured:
    """The times and the memory of one side.

    Attributes:
        first: seconds of the first step, which compiles.
        steps: milliseconds of steps.
        attention, busy: milliseconds a step of attention's kernels, and of all kernels.
        memory: MiB that a step takes beside the memory in use before it.
        kernels: milliseconds a step of the longest kernels. A file does not keep them.
    """

    first: float = 0.0
    steps: list[float] = field(default_factory=list[float])
    attention: float = 0.0
    busy: float = 0.0
    memory: float = 0.0
    kernels: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def step(self) -> float:
        return statistics.median(self.steps) if self.steps else 0.0


@dataclass(slots=True)
class Result:
    """sides: by name. out, gradient: the greatest relative difference of the sides, in the first step and in the last;
    worst: of which module. lowered: calls; strategies: of these; kept: calls by reason. layers: whose they are.
    """

    row: str
    layers: str
    sides: dict[str, Measured]
    lowered: int = 0
    strategies: list[str] = field(default_factory=list[str])
    kept: dict[str, int] = field(default_factory=dict[str, int])
    out: float = 0.0
    gradient: float = 0.0
    worst: str = ""

    def ratio(self, what: str) -> float:
        """Stock's / ours."""
        stock, ours = (getattr(self.sides[name], what) for name in SIDES)
        return stock / ours if ours else 0.0

    @staticmethod
    def of(data: Mapping[str, Any]) -> "Result":
        """The result that `asdict` made."""
        sides = {name: Measured(**side) for name, side in data["sides"].items()}
        return Result(**{name: value for name, value in data.items() if name != "sides"}, sides=sides)


MEASURES = ("step", "attention", "busy", "memory", "first")  # of each side
RATIOS = ("step", "attention")
ABOUT = ("row", "who", "shape", "launched")
REST = ("out", "gradient", "worst", "lowered", "strategies", "kept")
_BY_SIDE = tuple(f"{what}_{name}" for what in MEASURES for name in SIDES)
COLUMNS = ("machine", *ABOUT, "layers", *_BY_SIDE, *(f"{what}_x" for what in RATIOS), *REST)


def write_csv(results: Sequence[Result], path: Path, machine: str) -> None:
    """Writes one row for each result; times are milliseconds, those of first steps seconds. `machine` is where they
    were measured.
    """
    named = {row.name: row for row in ROWS}
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for result in results:
            row = named[result.row]
            cells = [f"{getattr(result.sides[name], what):.3f}" for what in MEASURES for name in SIDES]
            ratios = [f"{result.ratio(what):.3f}" for what in RATIOS]
            calls = (result.lowered, "; ".join(result.strategies), json.dumps(result.kept))
            rest = (f"{result.out:.5f}", f"{result.gradient:.5f}", result.worst, *calls)
            rows.writerow([machine, row.name, row.who, row.shape, row.launch, result.layers, *cells, *ratios, *rest])


def read_csv(path: Path, machine: str) -> list[Result]:
    """The results in a file that were measured on this machine; none if there is no file.

    Raises:
        ValueError: for a file that write_csv has not written.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if tuple(rows.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} is no file of --rows, whose columns are {', '.join(COLUMNS)}; name another one")
        return [_read(row) for row in rows if row["machine"] == machine]


def _read(row: Mapping[str, str]) -> Result:
    def side(name: str) -> Measured:
        step, attention, busy, memory, first = (float(row[f"{what}_{name}"]) for what in MEASURES)
        return Measured(first, [step] if step else [], attention, busy, memory)

    return Result(
        row["row"], row["layers"], {name: side(name) for name in SIDES},
        int(row["lowered"]), row["strategies"].split("; ") if row["strategies"] else [], json.loads(row["kept"]),
        float(row["out"]), float(row["gradient"]), row["worst"],
    )  # fmt: skip
