"""Lays a report, or the result of a self-test, out for people, as tables.

Knows nothing of how either comes about.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from cudnn_flex_compile.scoremod.ir import TRUE, Expr
from cudnn_flex_compile.scoremod.masks.bound import Bound
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.text import infix

if TYPE_CHECKING:
    from cudnn_flex_compile.report import CallReport, Report

WIDTH = 100
EXPLANATION = Path(__file__).with_name("explanation.py")
LONGEST = 240  # characters of one expression in the table; to_dict has all of it
NOTES = {
    "window": "window N: a query sees keys that are at most N before it",
    "operand": "operandN[h]: a tensor that is computed outside the kernel, one value per head (likewise b, q, kv)",
    "scalar": "scalarN: a Python number that is passed at run time",
}


def to_text(report: "Report", width: int = WIDTH) -> str:
    """The report as plain text of at most `width` columns."""
    return _plain(render(report), width)


def self_test(tests: Sequence[dict[str, Any]], width: int = WIDTH) -> str:
    """The result of `cudnn-flex doctor`, of items with name, strategies, reason (None, or as JSON) and seconds."""
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


def render(report: "Report") -> Group:
    """The report for rich: one row for each distinct call, then why calls were kept and what to do."""
    if not report.calls:
        return Group(Text("No flex_attention call was compiled: is it called, and not inside a graph break?"))
    rows = _distinct(report.calls)
    parts: list[Any] = [Text(report.summary), _calls_table(rows)]
    if report.kept:
        parts.append(_kept_table(rows))
    words = " ".join(describe_score(call) + describe_mask(call) for call, _ in rows)
    parts += [Text(note, style="dim") for word, note in NOTES.items() if word in words]
    return Group(*parts)


def _distinct(calls: "Sequence[CallReport]") -> "list[tuple[CallReport, int]]":
    """Calls that are told apart by what is shown of them, and how many there are of each."""
    found: dict[tuple[Any, ...], tuple[CallReport, int]] = {}
    for call in calls:
        key = (call.source, call.program, call.strategies, call.reason)
        found[key] = (call, found.get(key, (call, 0))[1] + 1)
    return list(found.values())


def _calls_table(rows: "Sequence[tuple[CallReport, int]]") -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("#", justify="right")
    table.add_column("calls", justify="right")
    table.add_column("where", max_width=26, overflow="fold")
    table.add_column("score", ratio=3, overflow="fold")
    table.add_column("mask", ratio=3, overflow="fold")
    table.add_column("lowered as", min_width=10, overflow="fold")
    for number, (call, count) in enumerate(rows, 1):
        shown = (_place(call.source), describe_score(call), describe_mask(call), _outcome(call))
        style = "" if call.reason is None else "yellow"
        table.add_row(str(number), str(count), *(Text(cell) for cell in shown), style=style)
    return table


def _kept_table(rows: "Sequence[tuple[CallReport, int]]") -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("#", justify="right")
    table.add_column("why it was kept", ratio=1, overflow="fold")
    table.add_column("what to do", ratio=1, overflow="fold")
    for number, (call, _) in enumerate(rows, 1):
        if call.reason is not None:
            table.add_row(*(Text(cell) for cell in (str(number), str(call.reason), call.reason.remedy)))
    return table


def _outcome(call: "CallReport") -> str:
    """The strategies of forward and backward, once if they are the same."""
    if call.reason is not None:
        return "kept"
    return ", backward ".join(call.strategies if len(set(call.strategies)) > 1 else call.strategies[:1])


def _place(source: str) -> str:
    """`gpt.py:12 forward` for `File "models/gpt.py", line 12, in forward: return ...`."""
    found = re.match(r'File "(.+?)", line (\d+), in ([^:]+)', source)
    if found is None:
        return source
    path, line, function = found.groups()
    if Path(path) == EXPLANATION:  # Dynamo leaves out code that is in no file, and shows what called it
        return "unknown source"
    named = Path(path).name != "__init__.py"
    return f"{'/'.join(Path(path).parts[-1 if named else -2 :])}:{line} {function.strip()}"


def describe_score(call: "CallReport") -> str:
    """The score in infix: `tanh(score / 20) * 20`."""
    return _short(infix(call.program.score)) if call.program else "not traced"


def describe_mask(call: "CallReport") -> str:
    """The mask in words where it has a name ("causal", "window 256"), else its bounds and what is left, in infix."""
    if call.program is None:
        return "not traced"
    form = split(call.program.mask)
    terms = _bands(form.bounds)
    terms += [infix(bias) for bias in form.biases]
    if form.residual is not TRUE:
        terms.append(infix(form.residual))
    terms.sort(key=lambda term: term != "causal")
    return _short(", ".join(terms)) or "none"


def _bands(bounds: Sequence[Bound]) -> list[str]:
    plain = {b.side: b.constant for b in bounds if not b.terms and b.side in ("lower", "upper")}
    if len(bounds) == len(plain) == 2 and plain["lower"] == plain["upper"] > 0:
        return [f"|q - kv| <= {plain['lower']}"]
    return [_bound(bound) for bound in bounds]


def _bound(bound: Bound) -> str:
    """Each side's inequality, solved for what people compare."""
    if bound.side == "lower" and not bound.terms and bound.constant == 0:
        return "causal"
    if bound.side == "upper" and not bound.terms and bound.constant >= 0:
        return f"window {bound.constant}"
    sign = -1 if bound.side == "start" else 1
    constant = sign * bound.constant
    terms = [(sign * factor, term) for factor, term in bound.terms]
    relation = ">=" if bound.side == "start" else "<="
    if bound.terms and constant == -1 and relation == "<=":
        relation, constant = "<", 0
    anchor = {"lower": "kv - q", "upper": "q - kv", "start": "kv", "end": "kv"}[bound.side]
    return f"{anchor} {relation} {_sum(terms, constant)}"


def _sum(terms: Sequence[tuple[int, Expr]], constant: int) -> str:
    """`a - b + 2`."""
    parts = [(sign < 0, infix(term)) for sign, term in terms]
    if constant or not parts:
        parts.append((constant < 0, str(abs(constant))))
    (negative, first), *rest = parts
    spelled = f"-{first}" if negative else first
    return spelled + "".join(f" {'-' if minus else '+'} {part}" for minus, part in rest)


def _short(expression: str) -> str:
    return expression if len(expression) <= LONGEST else f"{expression[: LONGEST - 3]}..."
