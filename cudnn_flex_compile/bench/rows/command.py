"""Runs `cudnn-flex bench --rows`: a process for each row, with empty compile caches, and a table of all of them.

Knows nothing of what is measured. A row that fails costs no other.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from cudnn_flex_compile.bench.rows.measure import Bench, Measured, Result, measure
from cudnn_flex_compile.bench.rows.rows import Row, chosen
from cudnn_flex_compile.bench.rows.show import table, write_csv

LONGEST = 300  # seconds of a row, after which its process is ended
TOLD = 30  # lines of what a process that failed printed


def run(given: argparse.Namespace, console: Console) -> int:
    """Exit codes: 0, 1 where a row failed."""
    if given.into:
        return _measure_here(given)
    rows = chosen(given.rows)
    results: list[Result] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(rows))
        for row in rows:
            progress.update(task, description=f"row {row.name}, {row.who}")
            found = _in_a_process(row, given)
            results += [] if found is None else [found]
            if found is not None:
                console.print(table([found], given.kernels))
            if given.csv and results:  # as far as it got
                write_csv(results, given.csv)
            progress.advance(task)
    if len(results) > 1:
        console.print(table(results))
    return 0 if len(results) == len(rows) else 1


def _measure_here(given: argparse.Namespace) -> int:
    (row,) = chosen(given.rows)
    if given.tiny:
        bench = Bench(row.tiny(), given.layers, "cpu", {"lower": given.lower}, trains=False)
    else:
        bench = Bench(row, given.layers, "cuda", {"lower": given.lower}, trains=True)
    found = measure(bench, given.steps)
    for side in found.sides.values() if given.tiny else ():
        side.steps.clear()  # they are no speed
    given.into.write_text(json.dumps(dataclasses.asdict(found)))
    return 0


def _in_a_process(row: Row, given: argparse.Namespace) -> Result | None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        into = Path(folder) / "result.json"
        command = [sys.executable, "-m", "cudnn_flex_compile.cli", "bench", "--rows", row.name, "--into", str(into)]
        command += ["--layers", str(given.layers), "--steps", str(given.steps), "--lower", given.lower]
        command += ["--tiny"] if given.tiny else []
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "CUDNN_FLEX_CACHE_DIR": f"{folder}/plans"}
        caches["TRITON_CACHE_DIR"] = f"{folder}/triton"
        failed = _run(command, {**os.environ, **caches})
        if failed or not into.is_file():
            print(f"cudnn-flex bench: row {row.name}, {row.who}, failed: {failed}", file=sys.stderr)
            return None
        return result_from(json.loads(into.read_text()))


def _run(command: list[str], environment: dict[str, str]) -> str:
    """Why it failed; empty if it did not."""
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
    """What a process wrote."""
    sides: Any = {name: Measured(**side) for name, side in given.pop("sides").items()}
    return Result(**given, sides=sides)
