"""Has kernels by tile lists compiled ahead of their use, side by side, each in a process of its own.

CuTe DSL compiles in one thread, for seconds. passes/contenders.py calls `begin` as soon as a call may run by lists;
until its kernels are needed, the caller finds other plans. A process (ahead_process.py) compiles one unit: the stages
that make lists, or the kernels that read them, of one direction. It puts them into the cache folder, from where the
frontend loads them. `awaited` waits for the process of a unit. Nothing depends on a process: what is not in the folder
then, the caller compiles itself.

Processes of one machine, such as the ranks of a job, compile a unit once: the lock of its file is held as long as a
process compiles it, and another file says that it is done.
"""

import atexit
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from cudnn_flex_compile.config import PREFIX
from cudnn_flex_compile.engine.problem import Problem
from cudnn_flex_compile.engine.store.identity import code_digest, compiler
from cudnn_flex_compile.engine.tiles.frontend import KERNELS
from cudnn_flex_compile.engine.tiles.tile_list import ARCHITECTURE
from cudnn_flex_compile.engine.tiles.units import Unit, units_of
from cudnn_flex_compile.engine.versions import packages
from cudnn_flex_compile.locks import new_lock
from cudnn_flex_compile.settings import settings

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
log = logging.getLogger("cudnn_flex_compile")
LEAST_CORES = 4
LIMIT, STEP = 30.0, 0.01  # seconds for a process, and between two looks at it
COMMAND = (sys.executable, "-m", "cudnn_flex_compile.engine.tiles.ahead_process")
SEEN = {  # by the process: no device, and the architecture for which it compiles
    "CUDA_VISIBLE_DEVICES": "", "FLEX_ATTENTION_ARCH": f"sm_{ARCHITECTURE}", "CUTE_DSL_ARCH": f"sm_{ARCHITECTURE}a",
}  # fmt: skip


def _locked(file: IO[bytes], how: int) -> bool:
    """Tries to lock a file, and says whether it could. A process that inherits the open file has its lock, too."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


@dataclass(slots=True)
class _Work:
    """The compilation of a unit, by a process of ours, or by another one's.

    Attributes:
        lock: the file that is locked meanwhile.
        done: the file that is there afterwards, also where that failed: then the caller's kernels are in the folder.
    """

    lock: Path
    done: Path
    process: "subprocess.Popen[bytes] | None" = None
    until: float = field(default_factory=lambda: time.monotonic() + LIMIT)

    def start(self, folder: Path, part: str, problems: Sequence[Problem]) -> None:
        """Starts the process, which has the lock from us; or none, where another one has it."""
        self.lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self.lock, "wb") as file:
            if not _locked(file, fcntl.LOCK_EX):
                return
            seen = {**os.environ, **SEEN, f"{PREFIX}CACHE": "1", f"{PREFIX}CACHE_DIR": str(folder)}
            self.process = subprocess.Popen(
                COMMAND, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=seen,
                pass_fds=(file.fileno(),),
            )  # fmt: skip
        with contextlib.suppress(OSError):  # it has ended already
            assert self.process.stdin is not None
            self.process.stdin.write(pickle.dumps((part, problems, self.done)))
            self.process.stdin.flush()  # and it stays open: the process ends with us

    def running(self) -> bool:
        """Looks whether a process compiles the unit."""
        if self.process is not None:
            return self.process.poll() is None
        try:
            with open(self.lock, "rb") as file:
                return not _locked(file, fcntl.LOCK_SH)
        except OSError:  # the folder was emptied
            return False

    def wait(self) -> None:
        """Waits for the end of the process, which is killed if it takes too long."""
        while time.monotonic() < self.until and self.running():
            time.sleep(STEP)
        self.end()

    def end(self) -> None:
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):  # what was not written to a process that has ended
            if self.process.stdin is not None:
                self.process.stdin.close()


_lock = new_lock()
_begun: dict[Unit, _Work] = {}


def begin(problems: Sequence[Problem]) -> None:
    """Has the kernels of a call compiled, if they are not in the cache folder yet. Never raises.

    Args:
        problems: its problems by tile lists, all that may be asked for.
    """
    folder = settings().folder
    if folder is None or _cores() < LEAST_CORES:
        return
    for unit, given in units_of(problems).items():
        try:
            _begin(unit, given, folder)
        except Exception:
            log.debug("cudnn_flex: kernels are not compiled ahead", exc_info=True)


@functools.cache
def _cores() -> int:
    """The number of processes that may run at a time, if there is a compiler."""
    if fcntl is None or not hasattr(os, "sched_getaffinity") or importlib.util.find_spec("cutlass") is None:
        return 0
    return len(os.sched_getaffinity(0))


def _begin(unit: Unit, problems: Sequence[Problem], folder: Path) -> None:
    text = "\n".join(map(str, (*unit, *packages(), compiler(), code_digest())))
    path = folder / KERNELS / "ahead" / hashlib.blake2b(text.encode(), digest_size=20).hexdigest()
    work = _Work(path.with_suffix(".lock"), path.with_suffix(".done"))
    with _lock:
        busy = sum(begun.process is not None and begun.running() for begun in _begun.values())
        if unit in _begun or busy >= _cores() or work.done.exists():
            return
        work.start(folder, unit.part, problems)
        _begun[unit] = work


@contextlib.contextmanager
def awaited(unit: Unit) -> Generator[None]:
    """Waits for the process that compiles a unit, if there is one. Within, the caller has it compiled or loaded."""
    work = _begun.get(unit)
    if work is None:
        yield
        return
    work.wait()
    yield
    with contextlib.suppress(OSError):
        work.done.touch()


@atexit.register
def end() -> None:
    """Ends all processes, and forgets them."""
    for work in _begun.values():
        work.end()
    _begun.clear()


if hasattr(os, "register_at_fork"):  # the processes are the parent's
    os.register_at_fork(after_in_child=_begun.clear)
