"""Lays a report, or the result of a self-test, out for people, as tables.

`print(report)`, `explain` and the command `cudnn-flex` use it. It reads reports, and needs rich.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.report.call import CallReport, Outside
from cudnn_flex_compile.report.picture import WIDTH as PICTURE_WIDTH
from cudnn_flex_compile.report.picture import Picture
from cudnn_flex_compile.report.words import describe_mask, describe_score
from cudnn_flex_compile.scoremod.ir import SCORE

WIDTH = 100
EXPLANATION = Path(__file__).parents[1] / "explanation.py"
LONGEST = 240  # characters of one expression in the table; to_dict has all of it
NOTES = {
    "window": "window N: a query sees keys that are at most N before it",
    "operand": "operandN[h]: a tensor that is computed outside the kernel, one value per head (likewise b, q, kv)",
    "scalar": "scalarN: a Python number that is passed at run time",
}


NONE: Mapping[Outside, int] = {}


def to_text(
    calls: Sequence[CallReport], summary: str, outside: Mapping[Outside, int] = NONE, width: int = WIDTH,
    details: bool = True,
) -> str:  # fmt: skip
    """A report as plain text of at most `width` columns; `details` are those of `render`."""
    return _plain(render(calls, summary, outside, details), width)


def self_test(tests: Sequence[dict[str, Any]], width: int = WIDTH) -> str:
    """The table of `cudnn-flex doctor`, for items with name, strategies, reason (None, or as JSON) and seconds."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for header in ("self-test", "forward, backward", "result"):
        table.add_column(header, overflow="fold")
    table.add_column("seconds", justify="right")
    for test in tests:
        why = test["reason"]
        result = "certified" if why is None else f"FAILED: {why['code']}: {why['detail']}"
        cells = (test["name"], ", ".join(test["strategies"]), result, f"{test['seconds']:.2f}")
        table.add_row(*(Text(cell) for cell in cells))
    failed = sum(test["reason"] is not None for test in tests)
    seconds = sum(test["seconds"] for test in tests)
    verdict = "Plans run right here" if not failed else f"{failed} of {len(tests)} programs have no right plan here"
    return _plain(Group(table, Text(f"{verdict} ({seconds:.1f} s).")), width)


def _plain(shown: Group, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(shown)
    lines: list[str] = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    return re.sub("\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip("\n")


def render(
    calls: Sequence[CallReport], summary: str, outside: Mapping[Outside, int] = NONE, details: bool = True
) -> Group:
    """A report for rich: its summary, one row for each distinct call, then the reasons for which calls were kept, with
    their remedies. With `details` it has the functions, the mask and the facts of each call's plans, too.
    """
    elsewhere = [_outside_table(outside)] if outside else []
    if not calls:
        none = Text("No flex_attention call was compiled: is it called, and not inside a graph break?")
        return Group(none, *elsewhere)
    rows = distinct(calls)
    parts: list[Any] = [Text(summary, style="bold"), _calls_table(rows), *elsewhere]
    if any(call.reason is not None for call in calls):
        parts.append(_kept_table(rows))
    words = " ".join(score_of(call) + mask_of(call) for call, _ in rows)
    parts += [Text(note, style="dim") for word, note in NOTES.items() if word in words]
    if details:
        drawn: dict[Picture | str, int] = {}
        for number, (call, _) in enumerate(rows, 1):
            first = drawn.setdefault(call.picture, number)
            parts.append(_details(number, call, first))
    return Group(*parts)


def distinct(calls: Sequence[CallReport]) -> list[tuple[CallReport, int]]:
    """The calls that look different in the tables, each with the number of calls that look the same."""
    found: list[tuple[CallReport, int]] = []
    numbers: dict[tuple[Any, ...], int] = {}
    for call in calls:
        number = numbers.setdefault(tuple(getattr(call, f.name) for f in fields(call)), len(found))
        known = found[number][1] if number < len(found) else 0
        found[number : number + 1] = [(call, known + 1)]
    return found


def _calls_table(rows: Sequence[tuple[CallReport, int]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("#", justify="right")
    table.add_column("calls", justify="right")
    table.add_column("where", max_width=26, overflow="fold")
    table.add_column("score", ratio=3, overflow="fold")
    table.add_column("mask", ratio=3, overflow="fold")
    table.add_column("lowered as", min_width=10, overflow="fold")
    for number, (call, count) in enumerate(rows, 1):
        shown = (place(call.source), score_of(call), mask_of(call), outcome(call))
        style = "" if call.reason is None else "yellow"
        table.add_row(str(number), f"x{count}", *(Text(cell) for cell in shown), style=style)
    return table


def _kept_table(rows: Sequence[tuple[CallReport, int]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("#", justify="right", max_width=12, overflow="fold")
    table.add_column("why it was kept", ratio=1, overflow="fold")
    table.add_column("what to do", ratio=1, overflow="fold")
    numbers: dict[Reason, list[str]] = {}
    for number, (call, _) in enumerate(rows, 1):
        if call.reason is not None:
            numbers.setdefault(call.reason, []).append(str(number))
    for reason, which in numbers.items():
        table.add_row(*(Text(cell) for cell in (", ".join(which), str(reason), reason.advice)))
    return table


def _outside_table(outside: Mapping[Outside, int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("outside", max_width=26, overflow="fold")
    table.add_column("times", justify="right")
    table.add_column("how it ran", ratio=1, overflow="fold")
    table.add_column("what to do", ratio=1, overflow="fold")
    for call, times in outside.items():
        table.add_row(*(Text(cell) for cell in (place(call.source), f"x{times}", call.ran, call.remedy)))
    return table


def _details(number: int, call: CallReport, first: int) -> Group:
    """The details of a call: the facts on the left, the mask on the right, once for all calls that share it.

    Args:
        first: the number of the first call with this picture.
    """
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="dim", min_width=9)
    facts.add_column(overflow="fold")
    for name, fact in _facts(call):
        facts.add_row(name, Text(fact, style="yellow" if name == "kept" else ""))
    beside = Table.grid(padding=(0, 2, 0, 0))
    beside.add_column(ratio=1)
    beside.add_column(width=PICTURE_WIDTH)
    beside.add_row(facts, Text(_drawn(call.picture) if first == number else f"same mask as {first}"))
    return Group(Text(""), Text(f"{number}  {place(call.source)}", style="bold"), beside)


def _drawn(picture: Picture | str) -> str:
    return picture if isinstance(picture, str) else "\n".join((*picture.lines(), picture.caption))


def _facts(call: CallReport) -> Iterator[tuple[str, str]]:
    """The facts of a call, each as its name and its value."""
    if call.score_source:
        yield "score_mod", call.score_source
    if call.program is not None:
        score = "unchanged" if call.program.score is SCORE else score_of(call)
        yield "lowered" if call.score_source else "score", score
    if call.mask_source:
        yield "mask_mod", call.mask_source
    if call.program is not None:
        yield "bounds" if call.mask_source else "mask", mask_of(call)
    yield "kept" if call.reason else "runs as", str(call.reason or outcome(call))
    if call.errors:
        yield "error", ", ".join(f"{e.name} {e.found:.1e} ({e.stock:.1e})" for e in call.errors)
        yield "", "as certified, and in parentheses that of stock precision"
    if call.expected is not None:
        yield "expected", f"about {call.expected:.1f}x as fast as Inductor"
    if call.contenders:
        known = "measured here" if all(contender.measured for contender in call.contenders) else "predicted"
        won = next((f", {c.name} won" for c in call.contenders if c.won), "")
        yield "times", f"{', '.join(map(str, call.contenders))}, {known}{won}"


def outcome(call: CallReport) -> str:
    """The strategies of forward and backward, once if they are the same."""
    if call.reason is not None:
        return "kept"
    return ", backward ".join(call.strategies if len(set(call.strategies)) > 1 else call.strategies[:1])


def place(source: str) -> str:
    """The short form of a source line: `gpt.py:12 forward` for `File "models/gpt.py", line 12, in forward: return ...`.
    """
    found = re.match(r'File "(.+?)", line (\d+), in ([^:]+)', source)
    if found is None:
        return source
    path, line, function = found.groups()
    if Path(path) == EXPLANATION:  # Dynamo leaves out code that is in no file, and shows its caller
        return "unknown source"
    named = Path(path).name != "__init__.py"
    return f"{'/'.join(Path(path).parts[-1 if named else -2 :])}:{line} {function.strip()}"


def score_of(call: CallReport) -> str:
    """The score in infix, as far as there is room for it."""
    return _short(describe_score(call.program)) if call.program else "not traced"


def mask_of(call: CallReport) -> str:
    """The mask in words, as far as there is room for it."""
    return _short(describe_mask(call.program)) if call.program else "not traced"


def _short(expression: str) -> str:
    return expression if len(expression) <= LONGEST else f"{expression[: LONGEST - 3]}..."
