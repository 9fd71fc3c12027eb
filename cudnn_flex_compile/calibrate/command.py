"""Runs the workers of a calibration and writes the table that the chooser reads (passes/decide/device_times.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from cudnn_flex_compile.calibrate.grid import DIMS
from cudnn_flex_compile.calibrate.worker import READY
from cudnn_flex_compile.passes.decide.device_times import KINDS


def measure() -> list[dict[str, Any]]:
    """Milliseconds a TFLOP of each way, on the current CUDA device. Raises RuntimeError where a worker fails."""
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # the workers are as many as there are cores
    workers = {
        (kind, dim): subprocess.Popen(
            [sys.executable, "-m", "cudnn_flex_compile.calibrate.worker", kind, str(dim)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for kind in KINDS for dim in DIMS
    }  # fmt: skip
    try:
        for what, worker in workers.items():
            assert worker.stdout is not None
            if worker.stdout.readline().strip() != READY:
                raise RuntimeError(f"calibration: the process of {what} failed: see its error above")
        rows: list[dict[str, Any]] = []
        for worker in workers.values():
            printed, _ = worker.communicate("go\n")
            rows += json.loads(printed.splitlines()[-1])
        return rows
    finally:
        for worker in workers.values():
            worker.kill()


def write(path: Path) -> None:
    """Measures, and writes the table of the current device."""
    rows = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n')
