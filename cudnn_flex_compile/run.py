"""Runs a script with `install()` in force and shows the report at its end, for launchers that start modules:

    torchrun --nproc-per-node 8 -m cudnn_flex_compile.run train.py ...
    torchrun --nproc-per-node 8 -m cudnn_flex_compile.run -m torchtitan.train ...

Options are taken from the environment (CUDNN_FLEX_...). The first process of a job shows its report, on stderr.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cudnn_flex_compile.script import run_script

USAGE_ERROR = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("-m", dest="module", action="store_true", help="`script` is the name of a module")
    parser.add_argument("script", help="path of a Python script, or with -m a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Runs the script, and returns its exit code."""
    if not given.module and not Path(given.script).is_file():
        parser.exit(USAGE_ERROR, f"{parser.prog}: {given.script!r} is no file; give the path of a Python script\n")
    from cudnn_flex_compile import install
    from cudnn_flex_compile.outside import listening
    from cudnn_flex_compile.report.report import collect

    with install(), collect() as report, listening(report.outside):
        code = run_script(given.script, given.arguments, given.module)
    if os.environ.get("RANK", "0") == "0":
        print(f"\ncudnn-flex run {given.script}\n{report}", file=sys.stderr)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """The command, as `python -m cudnn_flex_compile.run`."""
    parser = argparse.ArgumentParser(
        prog="python -m cudnn_flex_compile.run", description=__doc__.split(",")[0] if __doc__ else None
    )
    add_arguments(parser)
    return run(parser.parse_args(arguments), parser)


if __name__ == "__main__":
    sys.exit(main())
