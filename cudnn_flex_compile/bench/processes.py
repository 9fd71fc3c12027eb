"""Runs the processes of a measuring command, and ends them with it.

rows/command.py and regret/command.py have a process for each row, and for some cases each.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

LONGEST = 400  # seconds, after which a process is ended
ENDED = "it was ended, for another had failed"
TOLD = 30  # lines that are shown of the output of a process that failed


class Processes:
    """A context manager: processes that are running end with it, and those that they have started.

    One that fails before any has come to a good end ends all.

    Args:
        longest: the seconds after which one is ended.
    """

    def __init__(self, longest: float = LONGEST) -> None:
        self._longest = longest
        self._running: set[subprocess.Popen[bytes]] = set()
        self._one_worked = self.ended = False

    def __enter__(self) -> "Processes":
        self._before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return self

    def __exit__(self, *error: object) -> None:
        self.end()
        signal.signal(signal.SIGTERM, self._before)

    def run(self, command: list[str], environment: dict[str, str], log: Path) -> str:
        """Runs one to its end, and returns why it failed; the text is empty if it did not."""
        if self.ended:
            return ENDED
        with log.open("wb") as file:
            started = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._running.add(started)
        try:
            code: int | str = started.wait(self._longest)
        except subprocess.TimeoutExpired:
            code = f"none after {self._longest:.0f} s"
            _end(started)
        self._running.discard(started)
        if self.ended:
            return ENDED
        if code and not self._one_worked:
            self.end()
        self._one_worked |= not code
        return "\n".join([f"exit code {code}", *log.read_text(errors="replace").splitlines()[-TOLD:]]) if code else ""

    def end(self) -> None:
        """Ends what is running; nothing more is started."""
        self.ended = True
        for process in list(self._running):
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # it began a session: those that it started are its group
