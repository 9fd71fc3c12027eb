"""Lets processes share a GPU: several compile at once, and one measures while no other does anything.

All processes that compile share the lock of a file, and one that measures holds it alone.
"""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

TURNS = "turns.lock"  # the name of the file
Alone = Callable[[], AbstractContextManager[None]]


@contextmanager
def compiling(path: Path) -> Generator[Alone]:
    """Keeps others from measuring. Gives a function whose context is for measuring: it waits until all others have
    ended, or wait likewise.
    """
    import fcntl  # only POSIX has it

    with path.open("a") as file:

        @contextmanager
        def alone() -> Generator[None]:
            fcntl.flock(file, fcntl.LOCK_EX)  # this releases the shared lock first
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_SH)

        fcntl.flock(file, fcntl.LOCK_SH)
        try:
            yield alone
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a process that was forked meanwhile keeps the file open
