"""Runs `cudnn-flex bench --regret`: shares the cases out among processes, which compile side by side and measure one at
a time, and shows their results.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from cudnn_flex_compile.bench.case import Case
from cudnn_flex_compile.bench.processes import ENDED, LONGEST, Processes
from cudnn_flex_compile.bench.regret.cases import chosen
from cudnn_flex_compile.bench.regret.result import Result, read_csv, write_csv
from cudnn_flex_compile.bench.regret.show import one_line, show
from cudnn_flex_compile.bench.turns import TURNS, compiling
from cudnn_flex_compile.passes.decide.device_times import own_file

MOST = 12  # processes at once: each takes some GiB, and so does one that it starts to time Inductor's kernel
CACHE = "plans"


def run(given: argparse.Namespace, dtype: torch.dtype, console: Console, machine: str) -> int:
    """Measures all cases, on `machine`, and returns the exit code: 0, or 1 where a case failed. Those that are in the
    file of --csv already, measured on such a machine, are not measured again.
    """
    cases = chosen(given.regret, dtype, given.tiny)
    if given.into:
        return _measure_here(given, cases)
    known = read_csv(given.csv, machine) if given.csv else []
    results = {result.case: result for result in known if result.case in cases}
    missing = [name for name in cases if name not in results]
    count = min(given.at_once or _side_by_side(), len(missing))
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        Processes(LONGEST * max(len(missing), 1)) as processes,
        ThreadPoolExecutor(max(count, 1)) as pool,
    ):
        shares = [missing[i::count] for i in range(count)]
        running = [pool.submit(_in_a_process, s, given, Path(folder) / str(i), processes) for i, s in enumerate(shares)]
        for done in as_completed(running):
            for result in done.result():
                results[result.case] = result
                console.print(one_line(result), highlight=False)
            sys.stdout.flush()  # for whoever ends this command
            if given.csv:  # as far as it got
                write_csv([*results.values(), *(r for r in known if r.case not in results)], given.csv, machine)
    if results:
        show([results[name] for name in cases if name in results], console, machine)
    return 0 if len(results) == len(cases) else 1


def _side_by_side() -> int:
    """The number of processes: one for each core but one, which this machine's driver and others need."""
    return max(min((os.cpu_count() or 1) - 1, MOST), 1)


def _measure_here(given: argparse.Namespace, cases: dict[str, Case]) -> int:
    from cudnn_flex_compile.bench.regret.worker import measure

    own: Path = given.into.parent
    with compiling(own.parent / TURNS) as alone, given.into.open("w") as file:

        def tell(name: str, found: Result | str) -> None:
            said = {"case": name, "failed": found} if isinstance(found, str) else asdict(found)
            print(json.dumps(said), file=file, flush=True)

        measure(cases, given.repeats, alone, own / CACHE, tell)
    return 0


def _in_a_process(names: list[str], given: argparse.Namespace, own: Path, processes: Processes) -> list[Result]:
    """The results of a process of its own, as far as it got. The others are told of on stderr."""
    (own / CACHE / "devices").mkdir(parents=True)
    table = own_file() if torch.cuda.is_available() else None
    if table is not None and table.is_file():
        shutil.copy(table, own / CACHE / "devices")
    into = own / "results"
    command = [sys.executable, "-m", "cudnn_flex_compile.cli", "bench", "--regret", *names, "--into", str(into)]
    command += ["--repeats", str(given.repeats), "--dtype", given.dtype, *(["--tiny"] if given.tiny else [])]
    environment = {
        **os.environ, "CUDNN_FLEX_CACHE": "1", "CUDNN_FLEX_CACHE_DIR": str(own / CACHE),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # the processes are as many as there are cores
    }  # fmt: skip
    ended = processes.run(command, environment, own / "log")
    lines = [json.loads(line) for line in into.read_text().splitlines()] if into.is_file() else []
    failed = {line["case"]: line["failed"] for line in lines if "failed" in line}
    results = [Result.of(line) for line in lines if "failed" not in line]
    found = {result.case for result in results}
    for name in names:
        if name not in found:
            print(f"cudnn-flex bench: {name} failed: {failed.get(name, 'its process ended')}", file=sys.stderr)
    if ended and ended != ENDED:
        print(f"cudnn-flex bench: a process failed: {ended}", file=sys.stderr)
    return results
