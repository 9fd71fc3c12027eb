"""Processes that share a GPU: several compile at once, and one measures while no other does anything.

Knows nothing of what they measure. A file is locked: by all that compile, and by one alone that measures.
"""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

Alone = Callable[[], AbstractContextManager[None]]


@contextmanager
def compiling(path: Path) -> Generator[Alone]:
    """Nobody measures meanwhile. Gives a function whose context is for measuring: it waits until all others have ended,
    or wait likewise.
    """
    import fcntl  # of POSIX alone

    with path.open("a") as file:

        @contextmanager
        def alone() -> Generator[None]:
            fcntl.flock(file, fcntl.LOCK_EX)  # which lets go of the shared lock first
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_SH)

        fcntl.flock(file, fcntl.LOCK_SH)
        yield alone
