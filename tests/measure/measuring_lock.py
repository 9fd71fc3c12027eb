"""Scripts that are started together on one machine: all compile at once, and each measures with nothing else running.

Knows nothing of what is measured. A file is locked: by many where they compile or test, by one where it measures. So
whoever measures waits until all others that have begun have compiled, and they take turns.
"""

import fcntl
import multiprocessing
import os
import tempfile
import traceback
from contextlib import contextmanager
from multiprocessing.connection import wait

LOCK = "CUDNN_FLEX_TURNS"  # a variable that names the file, where it is another than this
FILE = os.path.join(tempfile.gettempdir(), "cudnn_flex_turns.lock")


@contextmanager
def _locked(how):
    with open(os.environ.get(LOCK, FILE), "a") as file:
        fcntl.flock(file, how)
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def compiling():
    """A context, or a decorator: nobody measures meanwhile. Gives what `measuring_within` takes."""
    return _locked(fcntl.LOCK_SH)


@contextmanager
def measuring_within(file):
    """As `measuring`, in a process that is `compiling`: it waits until all others have ended, or wait likewise."""
    fcntl.flock(file, fcntl.LOCK_EX)  # which lets go of the shared lock first
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_SH)


def measuring():
    """A context, or a decorator: nobody else measures or compiles meanwhile."""
    return _locked(fcntl.LOCK_EX)


def in_turn(work, parts):
    """What the generators `work(part)` yield, each in a process of its own, as it comes.

    Args:
        work: a function of a module. Its generator yields once when it has compiled, and then what it measures. In
            place of one that fails comes the traceback.
    """
    spawn, processes = multiprocessing.get_context("spawn"), {}
    with compiling():
        for part in parts:
            here, there = spawn.Pipe()
            processes[here] = spawn.Process(target=_run, args=(there, work, part), daemon=True)
            processes[here].start()
            there.close()
        for connection in processes:
            connection.recv()  # it has begun
    while processes:
        for connection in wait(processes):
            try:
                yield connection.recv()
            except EOFError:
                processes.pop(connection).join()


def _run(connection, work, part):
    try:
        with compiling():
            connection.send("begun")
            results = work(part)
            next(results)
        with measuring():
            for result in results:
                connection.send(result)
    except Exception:
        connection.send(f"{part}:\n{traceback.format_exc()}")
