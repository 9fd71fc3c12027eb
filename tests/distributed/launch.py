"""Runs cases of tests/distributed/cases.py in two processes, and reads their verdicts.

Knows nothing of what a case is.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(log, seconds, *command):
    """Two processes of a module or script, all that they print in the file `log`; None if they take too long."""
    with log.open("w") as file:
        started = subprocess.Popen([*TORCHRUN, *command], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            return started.wait(seconds)
        except subprocess.TimeoutExpired:
            started.terminate()  # torchrun ends its processes, too
            started.wait()
            return None


def verdicts(log, seconds, device, *cases):
    """By case: "ok" or what went wrong. One that did not come to an end is missing."""
    run(log, seconds, "-m", "tests.distributed.cases", "--device", device, *cases)
    return dict(re.findall(r"^case (\w+): (.*)$", log.read_text(), re.MULTILINE))
