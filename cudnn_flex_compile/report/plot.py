"""Draws the masks of a report into a file, one panel for each distinct call that has a picture.

`Report.plot` calls it. It needs matplotlib (the extra `plot`), which is imported only here.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cudnn_flex_compile.report.call import CallReport
from cudnn_flex_compile.report.picture import Picture
from cudnn_flex_compile.report.render import distinct, outcome, place

COLUMNS = 4  # panels in a row, at most
INCHES = 3.2  # the width and height of one panel


def plot(calls: Sequence[CallReport], path: Path) -> int:
    """Writes the file, in the format that its name ends with, and returns the number of masks in it.

    It writes no file where no call has a picture. Raises ImportError without matplotlib, ValueError for an unknown
    format, OSError for a file that cannot be written.
    """
    from matplotlib.figure import Figure

    rows = [(n, call, count) for n, (call, count) in enumerate(distinct(calls), 1)]
    rows = [row for row in rows if isinstance(row[1].picture, Picture)]
    if not rows:
        return 0
    wide = min(COLUMNS, len(rows))
    high = math.ceil(len(rows) / wide)
    figure = Figure(figsize=(INCHES * wide, (INCHES + 0.5) * high), layout="constrained")
    axes: list[Any] = list(figure.subplots(high, wide, squeeze=False).flat)
    for panel, (number, call, count) in zip(axes, rows, strict=False):
        _draw(panel, call.picture)  # pyright: ignore[reportArgumentType]
        panel.set_title(f"{number}: x{count} {place(call.source)}\n{outcome(call)}", fontsize=8)
    for empty in axes[len(rows) :]:
        empty.set_axis_off()
    figure.savefig(path, dpi=130)
    return len(rows)


def _draw(panel: Any, picture: Picture) -> None:
    queries, keys = picture.lengths
    pairs = (0, keys, queries, 0)
    panel.imshow(picture.cells, cmap="Greys", vmin=0, vmax=1, extent=pairs, aspect="auto", interpolation="nearest")
    panel.set_xlabel(f"kv, of {picture.of}" if picture.of else "kv", fontsize=8)
    panel.set_ylabel("q", fontsize=8)
    panel.tick_params(labelsize=7)
