"""Shows the results of rows: a table, and a chart.

command.py gives it the results of measure.py.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from cudnn_flex_compile.bench.rows.launch import OURS, SIDES, STOCK
from cudnn_flex_compile.bench.rows.result import Result
from cudnn_flex_compile.bench.rows.rows import ROWS

AGREES = 0.03  # the relative difference up to which two bfloat16 computations agree
COLORS = {"step": "#8fb58a", "attention": "#2f6f4f"}
NAMED = {row.name: row for row in ROWS}


def table(results: Sequence[Result], kernels: bool = False) -> Table:
    """The table of the results, one line for each row."""
    shown = Table(title=f"{STOCK} / {OURS}: a training step, attention's kernels, memory of a step, first step")
    for name in ("row", "who, how", "step, ms", "attention, ms", "MiB", "compile, s", "differ by: out, gradient"):
        shown.add_column(name, overflow="fold")
    shown.add_column("calls", overflow="fold")
    for result in results:
        row = NAMED[result.row]
        who = f"{row.who}\n[dim]{row.shape}; {row.launch}{whose(result)}"
        cells = (_pair(result, "step"), _pair(result, "attention"), _plain(result, "memory", 0))
        shown.add_row(row.name, who, *cells, _plain(result, "first", 1), _differs(result), calls(result))
        for name in SIDES if kernels else ():
            longest = "\n".join(f"{ms:8.3f} {kernel[:120]}" for kernel, ms in result.sides[name].kernels.items())
            shown.add_row("", f"[dim]{name}, busy {result.sides[name].busy:.2f} ms[/]\n{longest}")
    if len(results) > 1:
        shown.add_section()
        means = (mean(results, what) for what in ("step", "attention"))
        shown.add_row("", "geometric mean", *(f"[bold]{ratio:.2f}x" if ratio else "-" for ratio in means))
    return shown


def whose(result: Result) -> str:
    """A note whether the layers are those of transformers; empty for rows that transformers has no model of."""
    if not NAMED[result.row].family:
        return ""
    return f"; {result.layers}'s own layers" if result.layers else "; plain layers, transformers is not installed"


def calls(result: Result) -> str:
    """The number of calls that were lowered, with their strategies, and of those that were kept, with their reasons."""
    kept = [f"{count} kept: {reason}" for reason, count in result.kept.items()]
    return "\n".join([f"{result.lowered} lowered: {'; '.join(result.strategies)}", *kept])


def mean(results: Sequence[Result], what: str) -> float:
    """The geometric mean of the ratios that are known, or 0."""
    known = [ratio for ratio in (result.ratio(what) for result in results) if ratio]
    return math.exp(statistics.fmean(map(math.log, known))) if known else 0.0


def _pair(result: Result, what: str) -> str:
    ratio = result.ratio(what)
    style = "green" if ratio >= 1 else "red"
    return f"{_plain(result, what, 2)}\n[bold {style}]{ratio:.2f}x" if ratio else "-"


def _plain(result: Result, what: str, digits: int) -> str:
    return " / ".join(f"{getattr(result.sides[name], what):.{digits}f}" for name in SIDES)


def _differs(result: Result) -> str:
    text = f"{result.out:.4f}, {result.gradient:.4f}"
    wrong = not max(result.out, result.gradient) <= AGREES  # nor is NaN
    return f"[bold red]{text}[/]\n{result.worst}" if wrong else text


def plot(results: Sequence[Result], path: Path, title: str) -> None:
    """Bars of the speed-up of step and attention by row. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("agg")  # no window, whatever the machine has
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9.5, 0.42 * len(results) + 1.2), layout="constrained")
    for i, (what, color) in enumerate(COLORS.items()):
        places = [j + (i - 0.5) * 0.4 for j in range(len(results))]
        bars = axes.barh(places, [result.ratio(what) for result in results], 0.38, label=what, color=color)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.set_yticks(range(len(results)), [NAMED[result.row].who for result in results], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast as Inductor")
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
