"""Which rewrites for cuDNN's dialect are made: all of them, but in a test that shows what happens without one.

Knows nothing of what they do: engine/support.py lists them with their evidence.
"""

from collections.abc import Generator
from contextlib import contextmanager

_off: set[str] = set()


def on(rewrite: str) -> bool:
    """Whether a rewrite is made; all are, but in tests of what cuDNN does without."""
    return rewrite not in _off


@contextmanager
def switched_off(rewrites: set[str]) -> Generator[None]:
    """In the whole process, whatever the thread: plans are built in a thread of ours."""
    before = set(_off)
    _off.update(rewrites)
    try:
        yield
    finally:
        _off.intersection_update(before)
