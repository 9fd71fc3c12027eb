"""`Result` holds what each contender for a case takes, and `regret` compares the choice with the best of them.

worker.py measures it. It goes between processes as JSON, and is kept as rows of a CSV file, one for each contender.
"""

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cudnn_flex_compile.bench.case import STOCK

DEFAULT = "default"


@dataclass(slots=True)
class Contender:
    """A way to run a case.

    Attributes:
        ran: the strategies of forward and backward, or STOCK; empty if it can't run.
        why: the reason why it can't run, or why the default kept the call.
        milliseconds, spread: of a call, as measured; NaN if it can't run.
        predicted: the milliseconds that the chooser predicts; NaN where it has no prediction of its own.
    """

    ran: str = ""
    why: str = ""
    milliseconds: float = math.nan
    spread: float = math.nan
    predicted: float = math.nan


@dataclass(slots=True)
class Result:
    """The contenders for a case, by name: DEFAULT, STOCK, and the values of the option `strategy`."""

    case: str
    contenders: dict[str, Contender] = field(default_factory=dict[str, Contender])

    @property
    def best(self) -> str:
        """The fastest contender; the default where that runs as the fastest one does."""
        known = [name for name, c in self.contenders.items() if not math.isnan(c.milliseconds)]
        least = min(known, key=self._milliseconds)
        return DEFAULT if self.contenders[least].ran == self.contenders[DEFAULT].ran else least

    @property
    def regret(self) -> float:
        """The time of the default / that of the best."""
        return self._milliseconds(DEFAULT) / self._milliseconds(self.best)

    @property
    def speedup(self) -> float:
        """The time of Inductor's kernel / that of the default; NaN if it can't run."""
        return self._milliseconds(STOCK) / self._milliseconds(DEFAULT)

    def _milliseconds(self, name: str) -> float:
        """The least time of those contenders that run as this one does: they differ by chance."""
        ran = self.contenders[name].ran
        alike = [c.milliseconds for c in self.contenders.values() if c.ran == ran and not math.isnan(c.milliseconds)]
        return min(alike, default=math.nan)

    @staticmethod
    def of(data: Mapping[str, Any]) -> "Result":
        """The result that `asdict` made."""
        return Result(data["case"], {name: Contender(**given) for name, given in data["contenders"].items()})


MEASURES = {"milliseconds", "spread", "predicted"}
COLUMNS = ["machine", "case", "contender", *(f.name for f in fields(Contender))]


def write_csv(results: Iterable[Result], path: Path, machine: str) -> None:
    """Writes a row for each contender. `machine` is where they were measured."""
    with path.open("w", newline="") as file:
        rows = csv.DictWriter(file, COLUMNS)
        rows.writeheader()
        for result in results:
            for name, contender in result.contenders.items():
                rows.writerow({"machine": machine, "case": result.case, "contender": name, **asdict(contender)})


def read_csv(path: Path, machine: str) -> list[Result]:
    """The results in a file that were measured on this machine; none if there is no file.

    Raises:
        ValueError: for a file that write_csv has not written.
    """
    if not path.is_file():
        return []
    found: dict[str, Result] = {}
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if list(rows.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} is no file of --regret, whose columns are {', '.join(COLUMNS)}; name another one")
        for row in rows:
            if row.pop("machine") == machine:
                result = found.setdefault(row["case"], Result(row.pop("case")))
                name = row.pop("contender")
                result.contenders[name] = Contender(**{k: float(v) if k in MEASURES else v for k, v in row.items()})  # pyright: ignore
    return list(found.values())
