"""What our code takes of the host for a call, on any machine: `python3 -m tests.measure.host_path`.

The launch does nothing (tests/support/host_path.py), so this is what is left of a call's time once CUDA's is taken
away. Each call is timed warm, in rows, and cold: before each one some memory is read, as much as pushes code and
objects out of the caches, as the rest of a model does. Microseconds; the calls of Python and of C are counted.
"""

import argparse
import statistics
import time

import pytest
import torch

from tests.support.host_path import PROGRAMS, calls, install, python_calls

ROWS, CALLS, COLD, MIB = 200, 200, 300, 2**20


def warm(call):
    """Nanoseconds of a call, in the fastest of many rows."""
    best = float("inf")
    for _ in range(ROWS):
        start = time.process_time_ns()
        for _ in range(CALLS):
            call()
        best = min(best, (time.process_time_ns() - start) / CALLS)
    return best


def cold(call, memory):
    """Nanoseconds of single calls, each after other memory was read: the median, of which another process knows least,
    is of the faster half.
    """
    taken = []
    for _ in range(COLD):
        memory.add_(1)
        start = time.perf_counter_ns()
        call()
        taken.append(time.perf_counter_ns() - start)
    return statistics.median(sorted(taken)[: COLD // 2])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--show", action="store_true", help="list the functions that are called")
    shown = parser.parse_args().show
    memory = torch.zeros(64 * MIB, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        for name in PROGRAMS:
            for direction, call in calls(name).items():
                for _ in range(30):
                    call()
                python, in_c = python_calls(call)
                times = f"warm {warm(call) / 1e3:5.2f} us, cold {cold(call, memory) / 1e3:5.1f} us"
                print(f"{name}, {direction}: {times}; calls of Python {python.total()}, of C {in_c.total()}")
                for function, count in (python | in_c).items() if shown else ():
                    print(f"    {count} {function}")


if __name__ == "__main__":
    main()
