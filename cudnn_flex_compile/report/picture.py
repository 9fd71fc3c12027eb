"""A picture of a mask: the share of visible pairs in each cell of a grid.

passes/read/mask_picture.py makes it; render.py prints it as characters, and plot.py draws it.
"""

from dataclasses import dataclass
from typing import Any

SHADES = "·░▒▓█"  # nothing visible, up to a third, up to two thirds, more, all
WIDTH, HEIGHT = 32, 16  # characters, which are about twice as high as they are wide

Cells = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """One mask.

    Attributes:
        cells: shares from 0 to 1; the first row has the first queries, the first column the first keys.
        lengths: the numbers of queries and keys.
        of: the batch entry and head that it shows, where the mask depends on them.
    """

    cells: Cells
    lengths: tuple[int, int]
    of: str = ""

    @property
    def caption(self) -> str:
        """`q 0-4095 down, kv 0-4095 across, batch entry 0`."""
        queries, keys = self.lengths
        where = f", {self.of}" if self.of else ""
        return f"q 0-{queries - 1} down, kv 0-{keys - 1} across{where}"

    def lines(self, height: int = HEIGHT, width: int = WIDTH) -> list[str]:
        """The picture as at most `height` lines of at most `width` characters."""
        return ["".join(map(shade, row)) for row in coarser(self.cells, height, width)]

    def to_dict(self) -> dict[str, Any]:
        """The picture as JSON takes it."""
        return {"lengths": list(self.lengths), "of": self.of, "lines": self.lines()}


def shade(share: float) -> str:
    """The character of a share. Shares of 0 and of 1 have characters of their own."""
    if share in (0.0, 1.0):
        return SHADES[-1 if share else 0]
    return SHADES[1 + min(2, int(share * 3))]


def coarser(cells: Cells, height: int, width: int) -> Cells:
    """The picture with at most so many rows and columns, each cell the mean of a block."""
    rows, columns = _spans(len(cells), height), _spans(len(cells[0]), width)
    return tuple(tuple(_mean(cells, row, column) for column in columns) for row in rows)


def _spans(count: int, most: int) -> list[range]:
    parts = min(count, most)
    return [range(i * count // parts, (i + 1) * count // parts) for i in range(parts)]


def _mean(cells: Cells, rows: range, columns: range) -> float:
    return sum(cells[i][j] for i in rows for j in columns) / (len(rows) * len(columns))
