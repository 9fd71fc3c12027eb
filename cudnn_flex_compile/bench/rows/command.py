"""Runs `cudnn-flex bench --rows`: a process for each row, with empty compile caches, and a table of all of them.

measure.py measures one row in its process, and show.py shows the results. A row that fails costs no other.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from cudnn_flex_compile.bench.rows.measure import Bench, Measured, Result, measure
from cudnn_flex_compile.bench.rows.rows import Row, chosen
from cudnn_flex_compile.bench.rows.show import table, write_csv
from cudnn_flex_compile.bench.rows.turns import compiling

LONGEST = 400  # seconds of a row, after which its process is ended
TURNS = "turns.lock"
TOLD = 30  # lines that are shown of the output of a process that failed


def run(given: argparse.Namespace, console: Console) -> int:
    """Measures all rows, and returns the exit code: 0, or 1 where a row failed."""
    if given.into:
        return _measure_here(given)
    rows = chosen(given.rows)
    results: list[Result] = []
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        Progress(console=console, transient=True) as progress,
        ThreadPoolExecutor(given.at_once) as pool,
    ):
        task = progress.add_task(f"{len(rows)} rows", total=len(rows))
        running = {pool.submit(_in_a_process, row, given, Path(folder)): row for row in rows}
        for done in as_completed(running):
            progress.advance(task)
            found = done.result()
            if isinstance(found, str):
                row = running[done]
                print(f"cudnn-flex bench: row {row.name}, {row.who}, failed: {found}", file=sys.stderr)
                continue
            results.append(found)
            results.sort(key=lambda result: [row.name for row in rows].index(result.row))
            console.print(table([found], given.kernels))
            if given.csv:  # as far as it got
                write_csv(results, given.csv)
    if len(results) > 1:
        console.print(table(results))
    return 0 if len(results) == len(rows) else 1


def _measure_here(given: argparse.Namespace) -> int:
    (row,) = chosen(given.rows)
    if given.tiny:
        bench = Bench(row.tiny(), given.layers, "cpu", {"lower": given.lower}, trains=False)
    else:
        bench = Bench(row, given.layers, "cuda", {"lower": given.lower}, trains=True)
    with compiling(given.into.parent.parent / TURNS) as alone:
        found = measure(bench, given.steps, alone)
    for side in found.sides.values() if given.tiny else ():
        side.steps.clear()  # they are no speed
    given.into.write_text(json.dumps(dataclasses.asdict(found)))
    return 0


def _in_a_process(row: Row, given: argparse.Namespace, folder: Path) -> Result | str:
    """The result of a row in a process of its own, which begins with empty caches, or why it failed."""
    own = folder / row.name
    own.mkdir()
    into = own / "result.json"
    command = [sys.executable, "-m", "cudnn_flex_compile.cli", "bench", "--rows", row.name, "--into", str(into)]
    command += ["--layers", str(given.layers), "--steps", str(given.steps), "--lower", given.lower]
    command += ["--tiny"] if given.tiny else []
    caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "CUDNN_FLEX_CACHE_DIR": "plans", "TRITON_CACHE_DIR": "triton"}
    failed = _run(command, {**os.environ, **{name: str(own / where) for name, where in caches.items()}})
    return failed or result_from(json.loads(into.read_text()))


def _run(command: list[str], environment: dict[str, str]) -> str:
    """Runs a process, and says why it failed; empty if it did not."""
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LONGEST
        )
    except subprocess.TimeoutExpired as error:
        told = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else (error.stdout or "")
        return "\n".join([f"no end after {LONGEST} s", *told.splitlines()[-TOLD:]])
    if not done.returncode:
        return ""
    return "\n".join([f"exit code {done.returncode}", *done.stdout.splitlines()[-TOLD:]])


def result_from(given: dict[str, Any]) -> Result:
    """The result that a process wrote."""
    sides: Any = {name: Measured(**side) for name, side in given.pop("sides").items()}
    return Result(**given, sides=sides)
