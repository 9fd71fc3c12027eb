"""Runs `cudnn-flex bench --rows`: a process for each row, with empty compile caches, and a table of all of them.

measure.py measures one row in its process, and show.py shows the results. A row that fails costs no other.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from cudnn_flex_compile.bench.processes import ENDED, LONGEST, Processes
from cudnn_flex_compile.bench.rows.measure import Bench, measure
from cudnn_flex_compile.bench.rows.result import Result, read_csv, write_csv
from cudnn_flex_compile.bench.rows.row import Row
from cudnn_flex_compile.bench.rows.rows import ROWS, chosen
from cudnn_flex_compile.bench.rows.show import plot, table
from cudnn_flex_compile.bench.turns import TURNS, compiling


def run(given: argparse.Namespace, console: Console, facts: str) -> int:
    """Measures all rows, of which `facts` say where, and returns the exit code: 0, or 1 where a row failed. Those that
    are in the file of --csv already, measured on such a machine, are not measured again.

    Where a row fails before any has been measured, the others are ended: they would fail, too.
    """
    if given.into:
        return _measure_here(given)
    rows = chosen(given.rows)
    known = {result.row: result for result in (read_csv(given.csv, facts) if given.csv else [])}
    missing = [row for row in rows if row.name not in known]
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        Progress(console=console, transient=True) as progress,
        Processes(LONGEST * (given.at_once or 1)) as processes,
        ThreadPoolExecutor(given.at_once or 1) as pool,
    ):
        task = progress.add_task(f"{len(missing)} rows", total=len(missing))
        running = {pool.submit(_in_a_process, row, given, Path(folder), processes): row for row in missing}
        for done in as_completed(running):
            progress.advance(task)
            found, row = done.result(), running[done]
            if isinstance(found, str):
                told = found != ENDED
                print(f"cudnn-flex bench: row {row.name}, {row.who}, failed: {found}\n" * told, end="", file=sys.stderr)
                continue
            known[row.name] = found
            console.print(table([found], given.kernels))
            sys.stdout.flush()  # for whoever ends this command
            if given.csv:  # as far as it got
                write_csv([known[row.name] for row in ROWS if row.name in known], given.csv, facts)
    results = [known[row.name] for row in rows if row.name in known]
    if len(results) > 1:
        console.print(table(results))
    if given.plot and results:
        plot(results, given.plot, facts)
    return 0 if len(results) == len(rows) else 1


def _measure_here(given: argparse.Namespace) -> int:
    (row,) = chosen(given.rows)
    if given.tiny:
        bench = Bench(row.tiny(), given.layers, "cpu", {"lower": given.lower}, trains=False)
    else:
        bench = Bench(row, row.layers or given.layers, "cuda", {"lower": given.lower}, trains=True)
    with compiling(given.into.parent.parent / TURNS) as alone:
        found = measure(bench, given.steps, alone)
    for side in found.sides.values() if given.tiny else ():
        side.steps.clear()  # they are no speed
    given.into.write_text(json.dumps(dataclasses.asdict(found)))
    return 0


def _in_a_process(row: Row, given: argparse.Namespace, folder: Path, processes: Processes) -> Result | str:
    """The result of a process that begins with empty caches, or why it failed."""
    own = folder / row.name
    own.mkdir()
    into = own / "result.json"
    caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "CUDNN_FLEX_CACHE_DIR": "plans", "TRITON_CACHE_DIR": "triton"}
    environment = {**os.environ, **{name: str(own / where) for name, where in caches.items()}}
    failed = processes.run(_command(row, given, into), environment, own / "log")
    return failed or Result.of(json.loads(into.read_text()))


def _command(row: Row, given: argparse.Namespace, into: Path) -> list[str]:
    command = [sys.executable, "-m", "cudnn_flex_compile.cli", "bench", "--rows", row.name, "--into", str(into)]
    command += ["--layers", str(given.layers), "--steps", str(given.steps), "--lower", given.lower]
    return command + (["--tiny"] if given.tiny else [])
