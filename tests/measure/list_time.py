"""Times the lists of tiles of the masks of real configurations, which are new in each step: `python3 -m
tests.measure.list_time [ROW ...]`.

Knows nothing of right numbers (tests/gpu/test_shared_lists.py). A line for each row of `cudnn-flex bench --rows` and
each of its masks: the way in which the table of rows was made, the pairs that were looked at, and milliseconds of the
host and until the device is through, medians of the last steps. The last lines are those of
passes/decide/step_times.json: "list", the line of least squares over the lists that look at no pairs; and "look", what
a list takes for each 10^9 pairs that it looks at, by a compiled function and op by op, the largest of all lists that
look at MANY pairs.
"""

import dataclasses
import functools
import random
import statistics
import sys
import time
from unittest import mock

import torch
from torch.nn.attention.flex_attention import flex_attention

from cudnn_flex_compile.bench.rows.launch import block_masks
from cudnn_flex_compile.bench.rows.rows import chosen
from cudnn_flex_compile.kernels import row_tables, tile_lists
from tests.measure.documents_time import line

ROWS = ("1a", "3b", "4b", "5", "6", "8", "9a")
HEADS, DIM, STEPS, COUNTED, MANY = 2, 64, 9, 4, 2**28
WAYS = {getattr(row_tables, name): name for name in ("RUNS", "BLOCKS", "FIRST_BLOCKS", "PAIRS", "EVERY")}


def steps_of(row):
    """By mask, what runs a step with new data. Its attention is small in all but the lengths."""
    sizes = [(row.batch, HEADS, n, DIM) for n in (row.length, row.kv_length, row.kv_length)]
    qkv = [torch.zeros(size, device="cuda", dtype=torch.bfloat16) for size in sizes]
    drawn = row.draw(row, random.Random(0))
    x = torch.empty(row.batch, row.length, 1, device="cuda")

    def step(place, run, seed):
        data = {name: t.cuda() for name, t in row.draw(row, random.Random(seed)).items()}
        mask = block_masks(row, x, data)[place]
        torch.cuda.synchronize()
        with torch.no_grad():
            run(*qkv, block_mask=mask)

    for place in range(len(row.mods(row, drawn))):
        options = {"strategy": "tile_lists", "bias_budget_mb": 4096}
        run = torch.compile(flex_attention, backend="cudnn_flex", dynamic=False, options=options)
        yield functools.partial(step, place, run)


def measured(step):
    """Milliseconds of the host, and until the device is through, for each list; and what the last one needed."""
    times, needs = [], []

    def begin(listed, pairs, begin=tile_lists.begin):
        torch.cuda.synchronize()
        start = time.perf_counter()
        begin(listed, pairs)
        host = time.perf_counter()
        torch.cuda.synchronize()
        times.append(((host - start) * 1e3, (time.perf_counter() - start) * 1e3))
        needs.append((listed.needs.way, listed.needs.width, pairs))

    with mock.patch.object(tile_lists, "begin", begin):
        for seed in range(STEPS):
            step(seed)
    return [statistics.median(column) for column in zip(*times[-COUNTED:], strict=True)], *needs[-1]


def main(names):
    slopes, points = {True: [0.0], False: [0.0]}, []
    for row in chosen(list(names)):
        for step in steps_of(dataclasses.replace(row, heads=HEADS, kv_heads=HEADS)):
            (host, through), way, width, pairs = measured(step)
            looked_at = 0 if way < row_tables.FIRST_BLOCKS else row_tables.looked_at(way, pairs).count
            if not looked_at:
                points.append((row.batch * row.length * row.kv_length / 1e9, through))
            elif looked_at > MANY:
                slopes[way != row_tables.EVERY].append(through / looked_at * 1e9)
            what = f"{WAYS[way]}, {width} endpoints, {looked_at / 1e9:.2f} * 10^9 pairs"
            print(f"{row.name:<3} {what}: host {host:.3f} ms, through {through:.3f} ms", flush=True)
    print(f'"list": {line(points)}')
    print(f'"look": [{max(slopes[True]):.2f}, {max(slopes[False]):.2f}]')


if __name__ == "__main__":
    main(sys.argv[1:] or ROWS)
