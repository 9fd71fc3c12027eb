"""Switches for the rewrites that cuDNN's dialect needs. All are on, but in tests that show what happens without one.

Each rewrite asks for its switch where it is made; engine/support.py lists them with their evidence.
"""

from collections.abc import Generator
from contextlib import contextmanager

_off: set[str] = set()


def on(rewrite: str) -> bool:
    """Whether a rewrite is made."""
    return rewrite not in _off


@contextmanager
def switched_off(rewrites: set[str]) -> Generator[None]:
    """Switches rewrites off in the whole process, whatever the thread: plans are built in a thread of ours."""
    before = set(_off)
    _off.update(rewrites)
    try:
        yield
    finally:
        _off.intersection_update(before)
