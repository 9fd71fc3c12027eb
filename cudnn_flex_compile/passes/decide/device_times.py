"""The times of each way to run attention on a kind of device: a table that `cudnn-flex calibrate` measured.

The package has the tables of devices that we measured; a table in the cache folder is read first. This file imports no
other part of passes/, and cost_model.py reads it.
"""

import bisect
import functools
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cudnn_flex_compile.settings import settings

# Ways to run a call, named as the option `strategy` names ours, and kinds of calls: a causal mask alone, one under a
# soft cap, and a mask that a kernel reads at every pair, from memory.
INDUCTOR, NATIVE, CHAINED, TILE_LISTS = "inductor", "native", "chained", "tile_lists"
PLAIN, CAPPED, MASKED = KINDS = ("plain", "capped", "masked")
FOLDER = Path(__file__).parent / "devices"
REFERENCE = "NVIDIA H200"  # its table stands for the CPU, and for devices that have none until calls are measured there
Cell = tuple[str, str, str, int]  # way, direction, kind of call, head dim


@dataclass(frozen=True)
class DeviceTimes:
    """Milliseconds a TFLOP, of the two products of a forward, by length.

    Attributes:
        device: its name.
        cells: lengths, ascending, and the milliseconds for each.
        foreign: whether it stands for another kind of device, whose times it can't tell.
    """

    device: str
    cells: dict[Cell, tuple[tuple[int, ...], tuple[float, ...]]]
    foreign: bool = False

    def rate(self, way: str, direction: str, kind: str, dim: int, length: int) -> float | None:
        """The milliseconds a TFLOP at a head dim and length, interpolated between those measured; None without any."""
        dims = self._dims.get((way, direction, kind), ())
        rates = [_at(*self.cells[way, direction, kind, d], length) for d in dims]
        return _at(dims, tuple(rates), dim) if dims else None

    @functools.cached_property
    def _dims(self) -> dict[tuple[str, str, str], tuple[int, ...]]:
        """The head dims that were measured, ascending."""
        found: dict[tuple[str, str, str], list[int]] = {}
        for way, direction, kind, dim in sorted(self.cells):
            found.setdefault((way, direction, kind), []).append(dim)
        return {of: tuple(dims) for of, dims in found.items()}


def _at(places: tuple[int, ...], values: tuple[float, ...], place: int) -> float:
    """A value between those at the two nearest places, linear in the logarithms; beyond the ends, the value there."""
    right = bisect.bisect_left(places, place)
    if right == 0:
        return values[0]
    if right == len(places):
        return values[-1]
    low, high = places[right - 1], places[right]
    share = math.log(place / low) / math.log(high / low)
    return values[right - 1] ** (1 - share) * values[right] ** share


def own_file() -> Path | None:
    """The file of the current CUDA device in the cache folder; None without such a folder."""
    folder = settings().folder
    return None if folder is None else folder / "devices" / _file_name(torch.cuda.get_device_name())


def times_of(device: torch.device) -> DeviceTimes:
    """The table of a device, or that of the reference."""
    there = device.type == "cuda" and torch.cuda.is_available()
    return _table(torch.cuda.get_device_name(device) if there else REFERENCE)


@functools.cache
def _table(name: str) -> DeviceTimes:
    own = settings().folder
    folders = [FOLDER] if own is None else [own / "devices", FOLDER]
    for wanted, path in [(wanted, folder / _file_name(wanted)) for wanted in (name, REFERENCE) for folder in folders]:
        if path.is_file():
            return replace(read(path), foreign=wanted != name)
    raise FileNotFoundError(f"{FOLDER / _file_name(REFERENCE)} is part of the package, and is missing")


def read(path: Path) -> DeviceTimes:
    """Reads a table. Raises ValueError for a file that is none."""
    try:
        data = json.loads(path.read_text())
        cells: dict[Cell, dict[int, float]] = {}
        for row in data["rows"]:
            for direction in ("forward", "backward"):
                cell = cells.setdefault((row["way"], direction, row["kind"], row["dim"]), {})
                cell[row["length"]] = row[direction]
        return DeviceTimes(data["device"], {cell: _sorted(of) for cell, of in cells.items()})
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no table of `cudnn-flex calibrate`: {error!r}; delete it") from error


def _sorted(by_length: dict[int, Any]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    lengths = sorted(by_length)
    return tuple(lengths), tuple(float(by_length[n]) for n in lengths)


def _file_name(device: str) -> str:
    return re.sub(r"\W+", "_", device) + ".json"
