"""Runs 300 random layouts of packed documents by intervals: `python3 -m tests.measure.documents_layouts` counts wrong
ones.

Knows nothing of what is right (tests/gpu/test_documents.py compares with float64). The exit code is 1 if one is wrong,
or if a call took another road.
"""

import collections
import itertools
import sys
import time
import traceback

import torch

from cudnn_flex_compile.report.report import collect
from tests.gpu.test_documents import LAYOUTS, SHAPES, assert_right, attend, compiled, inputs
from tests.measure.measuring_lock import compiling
from tests.support.documents import KINDS, SPELLINGS, layout


@compiling()
def main():
    start, tried, wrong, roads = time.perf_counter(), collections.Counter(), collections.Counter(), []
    most = 0
    for number, (spelling, shape) in enumerate(calls := list(itertools.product(SPELLINGS, SHAPES))):
        torch._dynamo.reset()
        call, (*qkv, grad) = compiled(attend(spelling)), inputs(SHAPES[shape])
        with collect() as report:
            for seed in (0, *range(number or len(calls), LAYOUTS + 1, len(calls))):  # 0 is what the road is chosen by
                ids = layout(seed, *SHAPES[shape][:2])
                most, kind = max(most, len(ids.unique())), KINDS[seed % len(KINDS)]
                tried[kind] += seed > 0
                try:
                    ids = ids.cuda()
                    assert_right(call(*qkv, ids), qkv, grad, SPELLINGS[spelling](ids), f"layout {seed}")
                except Exception:
                    wrong[kind] += 1
                    traceback.print_exc()
        roads += [(spelling, shape, c.strategies or str(c.reason)) for c in report.calls]
        print(f"{spelling}, {shape}: {sum(tried.values())} layouts so far, {sum(wrong.values())} wrong", flush=True)
    others = [road for road in roads if road[2] != ("tile_lists", "tile_lists")]
    for road in others:
        print("another road:", *road)
    for kind in KINDS:
        print(f"{kind:<28} {tried[kind]:4d} layouts, {wrong[kind]} wrong")
    total, seconds = sum(tried.values()), time.perf_counter() - start
    print(f"{total} layouts of up to {most} documents, {sum(wrong.values())} wrong, {seconds:.0f} s")
    return int(bool(wrong or others))


if __name__ == "__main__":
    sys.exit(main())
