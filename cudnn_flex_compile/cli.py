"""The command `cudnn-flex`. `doctor` says whether plans run right on this machine, `explain` how the calls of a script
are lowered, `run` runs a script with its calls lowered, and `bench` measures attention.

Tables are laid out in report/render.py. Exit codes: 0 yes, 1 no (no plan can run here, or the self-test failed; the
script failed or compiled no flex_attention call), 2 wrong usage; a script's own exit code passes through.
"""

import argparse
import contextlib
import importlib.util
import json
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cudnn_flex_compile
from cudnn_flex_compile import run as run_command
from cudnn_flex_compile.bench.arguments import DESCRIPTION, add_arguments
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.script import run_script

if TYPE_CHECKING:
    from cudnn_flex_compile.report.report import Report

USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    return given.run(given, parser)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cudnn-flex", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--version", action="version", version=f"cudnn-flex {cudnn_flex_compile.__version__}")
    commands = parser.add_subparsers(required=True, metavar="doctor | explain | run | bench | calibrate")
    doctor = commands.add_parser("doctor", help="show versions and devices, and test whether plans run right here")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)
    explain = commands.add_parser(
        "explain",
        help="run a script, then show each flex_attention call that it compiled with the backend",
        description="Options of this command come before the script; what follows the script is passed to it.",
    )
    explain.add_argument("--json", action="store_true", help="print JSON; the script's own output goes to stderr")
    explain.add_argument("--plot", metavar="FILE", help="draw the masks into a file, such as masks.png (matplotlib)")
    explain.add_argument("script", help="path of a Python script that calls torch.compile(..., backend='cudnn_flex')")
    explain.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    explain.set_defaults(run=_explain)
    run = commands.add_parser(
        "run",
        help="run a script with every flex_attention call that Inductor compiles lowered, then show the report",
        description="Options of the backend are taken from the environment; what follows the script is passed to it.",
    )
    run_command.add_arguments(run)
    run.set_defaults(run=run_command.run)
    bench = commands.add_parser("bench", help="measure attention on this machine", description=DESCRIPTION)
    add_arguments(bench)
    bench.set_defaults(run=_bench)
    calibrate = commands.add_parser(
        "calibrate",
        help="measure how fast each way to run attention is on this kind of device, by which calls are lowered or kept",
    )
    calibrate.add_argument("--write", type=Path, metavar="FILE", help="where to (the cache folder, where it is read)")
    calibrate.set_defaults(run=_calibrate)
    return parser


def _bench(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from cudnn_flex_compile.bench.command import run

    return run(given)


def _calibrate(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    reason = _why_not()
    if reason is not None:
        print(f"nothing to calibrate: {reason}", file=sys.stderr)
        return 1
    from cudnn_flex_compile.calibrate.command import write
    from cudnn_flex_compile.passes.decide.device_times import own_file

    path = given.write or own_file()
    if path is None:
        parser.error("there is no cache folder (CUDNN_FLEX_CACHE=0): give --write FILE")
    write(path)
    print(path)
    return 0


def _doctor(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    facts, reason = _facts(), _why_not()
    if not given.json:
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name:<{width}}  {', '.join(value) if isinstance(value, list) else value}")
    tests = _self_test() if reason is None else []
    failed = [test for test in tests if test["reason"] is not None]
    if given.json:
        why = reason.to_dict() if reason else None
        print(json.dumps({**facts, "can_run": reason is None, "reason": why, "self_test": tests}, indent=2))
    elif reason is not None:
        print(f"\nNo plan can run here: {reason}.\nTo change that: {reason.advice}.")
    else:
        from cudnn_flex_compile.report.render import self_test

        print(f"\n{self_test(tests)}")
    return 1 if reason is not None or failed else 0


def _self_test() -> list[dict[str, Any]]:
    """The result of each program of engine/selftest.py, on the current device."""
    import torch

    from cudnn_flex_compile.engine import selftest

    return [
        {
            "name": outcome.name,
            "strategies": list(outcome.strategies),
            "reason": outcome.reason.to_dict() if outcome.reason else None,
            "seconds": round(outcome.seconds, 3),
        }
        for outcome in selftest.run(torch.cuda.current_device())
    ]


def _facts() -> dict[str, Any]:
    import torch

    from cudnn_flex_compile.engine.versions import cudnn_missing, cudnn_version

    missing = cudnn_missing()
    devices = [_device(i) for i in range(torch.cuda.device_count())]
    return {
        "cudnn_flex_compile": cudnn_flex_compile.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda or "none: a CPU build",
        "cudnn frontend": _installed("nvidia-cudnn-frontend"),
        "cuDNN": f"cannot be loaded: {missing}" if missing else _dotted(cudnn_version()),
        "cache folder": _cache_folder(),
        "devices": devices or ["no CUDA device"],
    }


def _cache_folder() -> str:
    """The folder in which plans are kept, by the environment, with the number of entries and their size."""
    from cudnn_flex_compile.engine.store.files import Store
    from cudnn_flex_compile.settings import settings

    given = settings()
    folder = given.folder
    if folder is None:
        return "none: switched off"
    entries, size = Store(folder, 0).size()
    return f"{folder}: {entries} entries, {size / 2**20:.1f} of {given.cache_mb} MiB"


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _device(index: int) -> str:
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    return f"{index}: {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"


def _dotted(version: int) -> str:
    """A version of cuDNN as text: 9.19.0 for 91900."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _why_not() -> Reason | None:
    """Why no plan can run on any device here, or None."""
    import torch

    from cudnn_flex_compile.engine.versions import cudnn_missing, unusable_device

    if not torch.cuda.is_available():
        missing = cudnn_missing()
        built = "torch sees no CUDA device" if torch.version.cuda else "torch is a CPU build; install one with CUDA"
        return Reason(Code.DEVICE, built if missing is None else f"{built}, and cuDNN is missing: {missing}")
    reasons = [unusable_device(i) for i in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


def _explain(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if not Path(given.script).is_file():
        parser.exit(
            USAGE_ERROR, f"{parser.prog} explain: {given.script!r} is no file; give the path of a Python script\n"
        )
    if given.plot and importlib.util.find_spec("matplotlib") is None:
        parser.exit(USAGE_ERROR, f"{parser.prog} explain: --plot needs matplotlib: pip install matplotlib\n")
    from cudnn_flex_compile.outside import listening
    from cudnn_flex_compile.report.report import collect

    output = contextlib.redirect_stdout(sys.stderr) if given.json else contextlib.nullcontext()
    with collect() as report, listening(report.outside), output:
        code = run_script(given.script, given.arguments)
    if given.json:
        print(json.dumps({"script": given.script, "exit_code": code, **report.to_dict()}, indent=2))
    elif report.calls or report.outside:
        _show(report, given.script)
    elif not code:
        print(
            f"cudnn-flex explain: {given.script} compiled no flex_attention call with backend='cudnn_flex'; "
            "pass it to torch.compile, and call the compiled model in the script's own process",
            file=sys.stderr,
        )
    drawn = not given.plot or not report.calls or _plotted(report, given.plot)
    return code or (0 if report.calls and drawn else 1)


def _show(report: "Report", script: str) -> None:
    """Prints a report, in colour and as wide as the terminal, if it is one."""
    print(f"\ncudnn-flex explain {script}")
    if not sys.stdout.isatty():
        print(report)
        return
    from rich.console import Console

    Console().print(report)


def _plotted(report: "Report", path: str) -> bool:
    """Draws the masks into a file, prints their number or an error, and returns whether it worked."""
    try:
        count = report.plot(path)
    except (OSError, ValueError) as error:
        print(f"cudnn-flex explain: cannot write {path}: {error}", file=sys.stderr)
        return False
    said = f"{count} masks drawn into {path}" if count else "no call has a mask that can be drawn"
    print(f"cudnn-flex explain: {said}", file=sys.stderr)
    return True


if __name__ == "__main__":
    sys.exit(main())
