"""Runs the command `cudnn-flex bench`.

Knows nothing of what is measured or how.
"""

import argparse
import os
import subprocess
import sys

import torch
from rich.console import Console
from rich.progress import Progress

from cudnn_flex_compile.bench.arguments import DTYPES
from cudnn_flex_compile.bench.case import Case, Shape, first_calls, named
from cudnn_flex_compile.bench.measure import Result, measure, step
from cudnn_flex_compile.bench.mods import EIGHT, FIVE, MODS

TORCH_DTYPES = dict(zip(DTYPES, (torch.bfloat16, torch.float16), strict=True))


def run(given: argparse.Namespace) -> int:
    """Exit codes: 0, 1 without a GPU or where compiling ahead failed, 2 for a mod or a shape that is none."""
    sys.path.insert(0, os.getcwd())  # for module:function, as python -m has it
    try:
        cases = cases_of(given)
    except ValueError as error:
        print(f"cudnn-flex bench: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("cudnn-flex bench: no NVIDIA GPU here; speed is only measured on one", file=sys.stderr)
        return 1
    if given.only_compile:
        for case in share(cases, given.only_compile):
            first_calls(case, case.functions(given.mode, with_sdpa=False), step)
        return 0
    if not _compiled_ahead(given.warm):
        print("cudnn-flex bench: a process that compiled ahead failed", file=sys.stderr)
        return 1
    console = Console()
    facts = (torch.cuda.get_device_name(), "torch", torch.__version__, "cuDNN", torch.backends.cudnn.version())
    console.print(*facts, highlight=False)
    show(_measured(cases, given, console), given, console)
    return 0


def cases_of(given: argparse.Namespace) -> list[Case]:
    """Raises ValueError for a mod or a shape that is none."""
    mods, shapes = (FIVE, EIGHT) if given.forty else (given.mods or MODS, given.shapes)
    for mod in mods:
        named(mod)
    options = {"lower": given.lower}
    return [Case(mod, Shape.parse(s), TORCH_DTYPES[given.dtype], options=options) for s in shapes for mod in mods]


def share(cases: list[Case], which: str) -> list[Case]:
    """Of "I/N": every N-th case from the I-th on."""
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
            progress.update(task, description=f"{case.mod} at {case.shape}")
            results.append(measure(case, given.repeats, given.mode, not given.no_sdpa))
            progress.advance(task)
    return results


def show(results: list[Result], given: argparse.Namespace, console: Console) -> None:
    from cudnn_flex_compile.bench.show import plot, table, write_csv

    console.print(table(results))
    if given.csv:
        write_csv(results, given.csv)
    if given.plot:
        plot(results, given.plot)
