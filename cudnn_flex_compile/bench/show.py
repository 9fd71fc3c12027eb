"""Lays results out: a table for people, CSV, and plots.

command.py gives it the results of measure.py. matplotlib is needed for plots alone.
"""

import csv
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from cudnn_flex_compile.bench.case import OURS, SDPA, STOCK
from cudnn_flex_compile.bench.measure import BACKWARD, BOTH, FORWARD, PARTS, Result, mean

TITLES = {FORWARD: "forward", BACKWARD: "backward", BOTH: "forward + backward"}
MARKERS = "osD^v"
COLORS = {FORWARD: "#8fb58a", BACKWARD: "#2f6f4f", BOTH: "#c9803a"}


def table(results: list[Result]) -> Table:
    """Milliseconds of Inductor / ours (and SDPA), each with its spread, and the ratio, by part."""
    shown = Table(title=f"{STOCK} / {OURS}, milliseconds a call, median ± half the quartiles' distance")
    for name in ("B,H,HKV,S,D", "mod", "how"):
        shown.add_column(name, overflow="fold")
    for part in measured(results):
        shown.add_column(TITLES[part], justify="right")
    for result in results:
        cells = [_cell(result, part) + _price(result, part, results) for part in measured(results)]
        shown.add_row(str(result.case.shape), result.case.name, result.how, *cells)
    if len(results) > 1:
        shown.add_section()
        shown.add_row("geometric mean", "", "", *(f"[bold]{mean(results, p):.2f}x" for p in measured(results)))
    return shown


def _cell(result: Result, part: str) -> str:
    times = [result.times[name, part] for name in (STOCK, OURS)]
    text = " / ".join(f"{t.median:.3f} ± {t.spread:.3f}" for t in times)
    style = "green" if result.ratio(part) >= 1 else "red"
    cell = f"{text}\n[bold {style}]{result.ratio(part):.2f}x"
    return cell + (f"[/] (SDPA {result.times[SDPA, part].median:.3f})" if (SDPA, part) in result.times else "")


def _price(result: Result, part: str, results: list[Result]) -> str:
    """Says how many times as long our calls take with deterministic algorithms, if both were measured."""
    plain = replace(result.case, deterministic=False)
    times = [r.times[OURS, part].median for r in results if r.case == plain]
    if not result.case.deterministic or not times:
        return ""
    return f"\n{result.times[OURS, part].median / times[0]:.2f} times as long as otherwise"


def measured(results: list[Result]) -> list[str]:
    """The parts that all results have."""
    return [part for part in PARTS if all((OURS, part) in result.times for result in results)]


def write_csv(results: list[Result], path: Path) -> None:
    """One row a result; times in milliseconds."""
    names = [name for name in (STOCK, OURS, SDPA) if any((name, BOTH) in r.times for r in results)]
    parts = measured(results)
    header = ["shape", "mod", "dtype", "deterministic", "strategies"]
    header += [f"{name}_{part}_{what}" for part in parts for name in names for what in ("ms", "spread_ms")]
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*header, *(f"{part}_x" for part in parts)])
        for result in results:
            case = result.case
            cells: list[Any] = [str(case.shape), case.mod, str(case.dtype)[6:], case.deterministic, result.how]
            for part in parts:
                for name in names:
                    time = result.times.get((name, part))
                    cells += [f"{time.median:.4f}", f"{time.spread:.4f}"] if time else ["", ""]
            rows.writerow([*cells, *(f"{result.ratio(part):.3f}" for part in parts)])


def plot(results: list[Result], path: Path) -> None:
    """Bars of the speed-up by mod; where a mod was measured at several lengths, lines over the length beside them.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("agg")  # no window, whatever the machine has
    from matplotlib import pyplot

    lengths = sorted({result.case.shape.length for result in results})
    mods = list(dict.fromkeys(result.case.name for result in results))
    count = 2 if len(lengths) > 1 else 1
    figure, all_axes = pyplot.subplots(1, count, figsize=(7.5 * count, 3.8), layout="constrained", squeeze=False)
    _bars(all_axes[0][0], results, mods)
    if count > 1:
        _lines(all_axes[0][1], results, mods)
    for axes in all_axes[0]:
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylabel("times as fast as Inductor")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _bars(axes: Any, results: list[Result], mods: list[str]) -> None:
    parts = measured(results)
    width = 0.8 / len(parts)
    for i, part in enumerate(parts):
        heights = [mean([r for r in results if r.case.name == mod], part) for mod in mods]
        places = [j + (i - (len(parts) - 1) / 2) * width for j in range(len(mods))]
        bars = axes.bar(places, heights, width * 0.95, label=TITLES[part], color=COLORS[part])
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_xticks(range(len(mods)), [mod.replace(" + ", "\n+ ") for mod in mods], fontsize=8)
    shapes = {str(result.case.shape) for result in results}
    axes.set_title(f"B,H,Hkv,S,D = {shapes.pop()}" if len(shapes) == 1 else f"geometric mean of {len(shapes)} shapes")


def _lines(axes: Any, results: list[Result], mods: list[str]) -> None:
    """A colour for each mod, a marker for each head dim; a line joins shapes of the same head dim."""
    head_dims = sorted({result.case.shape.head_dim for result in results})
    for (i, mod), (j, head_dim) in itertools.product(enumerate(mods), enumerate(head_dims)):
        own = [r for r in results if r.case.name == mod and r.case.shape.head_dim == head_dim]
        own.sort(key=lambda r: r.case.shape.length)
        points = [r.case.shape.length for r in own], [r.ratio(BOTH) for r in own]
        axes.plot(*points, marker=MARKERS[j % len(MARKERS)], color=f"C{i}", label=mod if j == 0 else None)
    for j, head_dim in enumerate(head_dims):
        axes.plot([], [], marker=MARKERS[j % len(MARKERS)], color="gray", linestyle="", label=f"head dim {head_dim}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("length")
    axes.set_title(TITLES[BOTH])
