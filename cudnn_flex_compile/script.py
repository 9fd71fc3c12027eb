"""Runs a script or a module as `python` does, for the commands `cudnn-flex explain` and `cudnn-flex run`."""

import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

INTERRUPTED = 130


def run_script(script: str, arguments: Sequence[str], module: bool = False) -> int:
    """Runs `python script ...`, or `python -m script ...`, and returns its exit code.

    An error of the script is shown as Python shows it, and gives 1.
    """
    before = sys.argv, sys.path[0]
    sys.argv, sys.path[0] = [script, *arguments], "" if module else str(Path(script).resolve().parent)
    try:
        if module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        return _exit_code(stop.code)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.argv, sys.path[0] = before
    return 0


def _exit_code(code: Any) -> int:
    """The exit code that Python gives for `sys.exit(code)`."""
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1
