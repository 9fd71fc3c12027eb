"""Runs the command `cudnn-flex bench`: measures each case that the arguments name (measure.py), and shows the results
(show.py).
"""

import argparse
import dataclasses
import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import Progress

from cudnn_flex_compile import inductor_seam
from cudnn_flex_compile.bench.arguments import DTYPES
from cudnn_flex_compile.bench.case import Case, Shape, first_calls, named
from cudnn_flex_compile.bench.measure import Result, measure, step
from cudnn_flex_compile.bench.mods import BY_BATCH, EIGHT, ENTRIES, FIVE, MODS
from cudnn_flex_compile.bench.regret.cases import chosen as cases_of_regret
from cudnn_flex_compile.bench.regret.command import run as run_regret
from cudnn_flex_compile.bench.regret.result import read_csv as read_regret
from cudnn_flex_compile.bench.rows.command import run as run_rows
from cudnn_flex_compile.bench.rows.result import read_csv as read_rows
from cudnn_flex_compile.bench.rows.rows import chosen
from cudnn_flex_compile.bench.show import plot, table, write_csv

log = logging.getLogger("cudnn_flex_compile")
WIDTH = 160  # columns of a table that goes to no terminal
TORCH_DTYPES = dict(zip(DTYPES, (torch.bfloat16, torch.float16), strict=True))


def run(given: argparse.Namespace) -> int:
    """Runs all cases, and returns the exit code: 0, 1 without a GPU or where a case failed, 2 for wrong usage.

    A case that fails is reported, and costs no other.
    """
    inductor_seam.take_out()  # the other side is stock, whatever the environment says
    sys.path.insert(0, os.getcwd())  # for module:function, as python -m has it
    try:
        cases = cases_of(given) if given.rows is None and given.regret is None else []
        chosen(given.rows or [])
        cases_of_regret(given.regret or [], TORCH_DTYPES[given.dtype], given.tiny)
        _check_outputs(given)
    except ValueError as error:
        print(f"cudnn-flex bench: {error}", file=sys.stderr)
        return 2
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    in_processes = given.rows is not None or given.regret is not None
    if not torch.cuda.is_available() and not (given.tiny and in_processes):
        print("cudnn-flex bench: no NVIDIA GPU here; speed is only measured on one", file=sys.stderr)
        return 1
    if not given.into and not given.only_compile:
        console.print(facts(), highlight=False)
    if given.rows is not None:
        return run_rows(given, console, facts())
    if given.regret is not None:
        return run_regret(given, TORCH_DTYPES[given.dtype], console, facts())
    if given.only_compile:
        for case in share(cases, given.only_compile):
            _without_fail(case, lambda case=case: first_calls(case, case.functions(given.mode, with_sdpa=False), step))
        return 0
    if not _compiled_ahead(given.warm):
        print("cudnn-flex bench: a process that compiled ahead failed; its cases are compiled here", file=sys.stderr)
    results = _measured(cases, given, console)
    if results:
        show(results, given, console)
    return 0 if len(results) == len(cases) else 1


def facts() -> str:
    """The figures' source."""
    if not torch.cuda.is_available():
        return f"the CPU torch {torch.__version__}"
    return f"{torch.cuda.get_device_name()} torch {torch.__version__} cuDNN {torch.backends.cudnn.version()}"


def cases_of(given: argparse.Namespace) -> list[Case]:
    """The cases that the arguments name. Raises ValueError for an unknown mod or a wrong shape."""
    mods, shapes = (FIVE, EIGHT) if given.forty else (given.mods or MODS, given.shapes)
    for mod in mods:
        named(mod)
    options = {"lower": given.lower}
    cases = [Case(mod, Shape.parse(s), TORCH_DTYPES[given.dtype], options=options) for s in shapes for mod in mods]
    if given.deterministic:
        cases = [dataclasses.replace(case, deterministic=how) for case in cases for how in (False, True)]
    for case in cases:
        if case.mod in BY_BATCH and case.shape.batch > ENTRIES:
            raise ValueError(f"{case.mod!r} is a mask of at most {ENTRIES} batch entries, not of {case.shape.batch}")
    return cases


def _check_outputs(given: argparse.Namespace) -> None:
    """Raises ValueError for files that cannot be written or gone on with, before anything is measured."""
    for path in filter(None, (given.csv, given.plot)):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {path.absolute().parent}")
    if given.csv and given.rows is not None:
        read_rows(given.csv, "")
    elif given.csv and given.regret is not None:
        read_regret(given.csv, "")
    if given.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib")


def share(cases: list[Case], which: str) -> list[Case]:
    """The share "I/N" of the cases: every N-th from the I-th on."""
    first, count = map(int, which.split("/"))
    return cases[first::count]


def _compiled_ahead(processes: int) -> bool:
    """Compiles all cases in other processes at once, for their caches' sake: this one measures alone."""
    command = [sys.executable, "-m", "cudnn_flex_compile.cli", *sys.argv[1:], "--only-compile"]
    running = [subprocess.Popen([*command, f"{i}/{processes}"]) for i in range(processes)]
    codes = [process.wait() for process in running]
    return not any(codes)


def _measured(cases: list[Case], given: argparse.Namespace, console: Console) -> list[Result]:
    results: list[Result] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            found = _without_fail(case, lambda case=case: measure(case, given.repeats, given.mode, not given.no_sdpa))
            results += [] if found is None else [found]
            if given.csv and results:  # as far as it got
                write_csv(results, given.csv)
            progress.advance(task)
    return results


Found = TypeVar("Found")


def _without_fail(case: Case, run: Callable[[], Found]) -> Found | None:
    """The result of `run` with the case's algorithms; None if it raises, which is printed."""
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(case.deterministic)
        return run()
    except Exception as error:
        log.debug("%s", case, exc_info=True)
        what = (str(error).strip().splitlines() or [""])[0]
        print(f"cudnn-flex bench: {case} failed: {type(error).__name__}: {what}", file=sys.stderr)
        return None
    finally:
        torch.use_deterministic_algorithms(before)


def show(results: list[Result], given: argparse.Namespace, console: Console) -> None:
    console.print(table(results))
    if given.csv:
        write_csv(results, given.csv)
    if given.plot:
        plot(results, given.plot)
