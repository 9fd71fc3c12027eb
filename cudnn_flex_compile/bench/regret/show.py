"""Lays the regret of choices out as a table, whose last lines are the geometric mean and the worst cases."""

import math
import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from cudnn_flex_compile.bench.case import STOCK
from cudnn_flex_compile.bench.regret.result import DEFAULT, Contender, Result

TITLE = "milliseconds of a call, as measured, and in parentheses as predicted"


def show(results: Sequence[Result], console: Console, where: str) -> None:
    console.print(_table(results, where))
    for line in summary(results):
        console.print(line, highlight=False)


def _table(results: Sequence[Result], where: str) -> Table:
    table = Table(title=f"{TITLE}; {where}")
    for name in ("case", "default", "default / best", f"{STOCK} / default", "contenders"):
        table.add_column(name, overflow="fold")
    for result in results:
        default = result.contenders[DEFAULT]
        ran = f"{default.ran}\n{_times(default)}" + (f"\n[dim]{default.why}" if default.why else "")
        best = f"{result.regret:.2f}" + (f"\n{result.best}" if result.best != DEFAULT else "")
        others = [_line(name, c, default) for name, c in result.contenders.items() if name != DEFAULT]
        table.add_row(result.case, ran, best, f"{result.speedup:.2f}", "\n".join(others))
    return table


def _times(contender: Contender) -> str:
    predicted = "" if math.isnan(contender.predicted) else f" ({contender.predicted:.3f})"
    return f"{contender.milliseconds:.3f}{predicted}"


def _line(name: str, contender: Contender, default: Contender) -> str:
    if not contender.ran:
        return f"[dim]{name}: {contender.why}[/]"
    ran = "as the default" if contender.ran == default.ran else contender.ran
    return f"{name} {_times(contender)}" + ("" if contender.ran == name else f" [dim]{ran}[/]")


def one_line(result: Result) -> str:
    """The regret of a case, with the times that it is of."""
    return f"{result.regret:5.2f} {result.case}: {_both(result)}"


def summary(results: Sequence[Result]) -> list[str]:
    """The geometric mean of the regrets, the worst one, and the case in which the default does worst beside Inductor.
    """
    regrets = {result.case: result.regret for result in results}
    mean = math.exp(statistics.fmean(map(math.log, regrets.values())))
    worst = max(results, key=lambda result: result.regret)
    lines = [
        f"default / best over {len(results)} cases: geometric mean {mean:.3f}",
        f"worst: {worst.regret:.2f}, {worst.case}: {_both(worst)}",
    ]
    beside = [result for result in results if not math.isnan(result.speedup)]
    if beside:
        least = min(beside, key=lambda result: result.speedup)
        lines.append(f"least {STOCK} / default: {least.speedup:.2f}, {least.case}: {_named(least, DEFAULT)}")
    return lines


def _both(result: Result) -> str:
    return ", ".join(_named(result, name) for name in dict.fromkeys((DEFAULT, result.best)))


def _named(result: Result, name: str) -> str:
    contender = result.contenders[name]
    return f"{name} {contender.milliseconds:.3f} ms ({contender.ran})"
