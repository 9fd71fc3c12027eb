"""What our code takes of the host for a call, on any machine: `python3 -m tests.measure.host_path`.

The launch does nothing (tests/support/host_path.py), so this is what is left of a call's time once CUDA's is taken
away. A call runs bound (kernels/bound_calls.py), or is looked up by its key; both take turns. It is timed warm, in
rows, and cold: before each one memory is written, as much as pushes code and objects out of the caches, as the rest of
a model does. Microseconds; the calls of Python and of C are counted. Then what the parts of a look-up take, warm.
"""

import argparse
import time

import pytest
import torch

from cudnn_flex_compile.kernels import bound_calls
from tests.support.host_path import PROGRAMS, calls, install, parts, python_calls

ROWS, CALLS, COLD, MIB = 100, 200, 300, 2**20
BOUND, BY_KEY = "bound", "by key"


def warm(call):
    """Microseconds of a call, in a row of them."""
    start = time.process_time_ns()
    for _ in range(CALLS):
        call()
    return (time.process_time_ns() - start) / CALLS / 1e3


def cold(call, memory):
    """Microseconds of a single call, after other memory was written."""
    memory.add_(1)
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e3


def switched(way):
    """Has calls run bound, or looked up: a program of too many calls has no bound one."""
    for table in (bound_calls.forwards, bound_calls.backwards):
        for program in table:
            if (table[program] is None) == (way == BOUND):
                table[program] = OF_PROGRAM[id(table), program] if way == BOUND else None


OF_PROGRAM = {}  # the bound calls, by table and program


def noted():
    for table in (bound_calls.forwards, bound_calls.backwards):
        OF_PROGRAM.update({(id(table), program): call for program, call in table.items() if call is not None})


def measured(call, memory):
    """By way: the least time of rows, the lower quartile of cold calls, and the calls of Python and of C."""
    call(), noted()
    found = {way: ([], []) for way in (BOUND, BY_KEY)}
    for number in range(max(ROWS, COLD)):
        for way, (rows, single) in found.items():
            switched(way)
            if number < ROWS:
                rows.append(warm(call))
            single.append(cold(call, memory))
    counts = {}
    for way in found:
        switched(way)
        counts[way] = min((python_calls(call) for _ in range(20)), key=lambda both: both[0].total())
    switched(BOUND)
    return {way: (min(rows), sorted(single)[COLD // 4], *counts[way]) for way, (rows, single) in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--show", action="store_true", help="list the functions that are called")
    shown, memory = parser.parse_args().show, torch.zeros(64 * MIB, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        for name in PROGRAMS:
            for direction, call in calls(name).items():
                for way, (row, single, python, in_c) in measured(call, memory).items():
                    counted = f"calls of Python {python.total()}, of C {in_c.total()}"
                    print(f"{name}, {direction}, {way}: warm {row:5.2f}, cold {single:5.1f}; {counted}", flush=True)
                    for function, count in (python | in_c).items() if shown else ():
                        print(f"    {count} {function}")
        for name, part in parts().items():
            print(f"{name}: {min(warm(part) for _ in range(ROWS)):.2f}")


if __name__ == "__main__":
    main()
