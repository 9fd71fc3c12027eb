"""Writes the table of docs/benchmarks.md that says what `cudnn-flex calibrate` measured on an H200:
`python3 -m tests.support.device_table --write` after a calibration.

It must not know how calls are chosen.
"""

import sys

from cudnn_flex_compile.calibrate.grid import DIMS, LENGTHS
from cudnn_flex_compile.passes.decide.device_times import (
    CAPPED,
    CHAINED,
    FOLDER,
    INDUCTOR,
    MASKED,
    NATIVE,
    PLAIN,
    TILE_LISTS,
    read,
)  # fmt: skip
from tests.support.docs_tables import show

PAGE, NAME = "benchmarks.md", "device times"
COLUMNS = (
    (INDUCTOR, PLAIN), (NATIVE, PLAIN), (TILE_LISTS, PLAIN), (INDUCTOR, CAPPED), (CHAINED, CAPPED), (INDUCTOR, MASKED),
)  # fmt: skip
HEAD = ("Inductor", "graphs", "tile lists", "Inductor, soft cap", "graphs, soft cap", "Inductor, a mask from memory")


def table() -> str:
    times = read(FOLDER / "NVIDIA_H200.json")
    lines = [f"| head dim, length | {' | '.join(HEAD)} |", f"| --- |{' --- |' * len(HEAD)}"]
    for dim in DIMS:
        for length in LENGTHS:
            cells = []
            for way, kind in COLUMNS:
                pair = (times.rate(way, direction, kind, dim, length) for direction in ("forward", "backward"))
                cells.append(" / ".join(f"{rate:.2f}" for rate in pair))
            lines.append(f"| {dim}, {length} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv:
        show(PAGE, NAME, table())
    else:
        print(table())
