"""Locks that the child of a fork can take, whoever held them in the parent: no other thread lives on in the child.

Knows nothing of what is locked: whoever changes something in several steps under a lock must not be forked amid them
and then be read by the child.
"""

import os
import threading


def new_lock() -> threading.Lock:
    """A lock that is free in the child of a fork, whoever held it in the parent."""
    lock = threading.Lock()
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(after_in_child=lock._at_fork_reinit)  # pyright: ignore[reportAttributeAccessIssue]
    return lock
