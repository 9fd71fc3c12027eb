"""Locks that the child of a fork can take, whoever held them in the parent: no other thread lives on in the child.

The lock alone is made free in the child. Data that was being changed in several steps under it may be half changed
there, so the child must not read it.
"""

import os
import threading
from typing import Any


def new_lock() -> threading.Lock:
    """A lock that is free in the child of a fork, whoever held it in the parent."""
    return _free_after_fork(threading.Lock())


def new_reentrant_lock() -> Any:
    """A lock that the thread which holds it may take again, free in the child of a fork as well."""
    return _free_after_fork(threading.RLock())


def _free_after_fork(lock: Any) -> Any:
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(after_in_child=lock._at_fork_reinit)
    return lock
