"""Times plain scores in each way that they can run: `python3 -m tests.measure.tile_lists [masks | lengths | dims] ...`.

Knows nothing of right numbers (tests/gpu/test_plain_masks.py). The sets of cases are

    masks       of all kinds, at B 2, H 16, S 4096, D 128
    lengths     full and causal, at the shapes of `cudnn-flex bench --forty` of 2048 and more
    dims        full and causal, at head dims of 64 to 256 and lengths of 512 to 4096

and the ways Inductor's kernel, cuDNN's graphs, tile lists, each forced, and what the package takes by itself. A step is
LAYERS calls with queries, keys and values of their own, which share a BlockMask that stays the same. Each row has for
each way milliseconds a call as called, forward and both, medians of interleaved steps, and in brackets what its kernels
take in the forward and in the backward, by the profiler. A process for some cases compiles; they measure in turn. The
last lines are geometric means of the ratios.
"""

import itertools
import math
import statistics
import sys

import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.profiler import ProfilerActivity, profile

from cudnn_flex_compile import configure
from cudnn_flex_compile.bench.mods import EIGHT
from cudnn_flex_compile.report.report import collect
from tests.measure.measuring_lock import in_turn
from tests.support.plain_masks import MASKS, block_mask, inputs, window

LAYERS, WARM_UP, REPEATS, IN_A_ROW, PROFILED, CASES = 4, 2, 5, 3, 2, 3
WAYS = {
    "inductor": None, "graphs": {"strategy": "graphs"}, "lists": {"strategy": "tile_lists"}, "default": {},
}  # fmt: skip
# B, H, S, D, Hkv
LONG = [(b, h, s, d, kv) for b, h, kv, s, d in (map(int, shape.split(",")) for shape in EIGHT) if s >= 2048]
SMALL = ("window", "sliding", "rows that see nothing")
OF_MASKS = {"window 256": window(256), "window 1024": window(1024)}
OF_MASKS |= {name: make for name, make in MASKS.items() if name not in SMALL}
SETS = {
    "masks": [(name, (2, 16, 4096, 128, 16)) for name in OF_MASKS],
    "lengths": [(name, shape) for shape in LONG for name in ("full", "causal")],
    "dims": [
        (name, (8192 // length, 4096 // dim, length, dim, 4096 // dim // group))
        for dim in (64, 128, 256) for length in (512, 1024, 4096) for name, group in (("causal", 4), ("full", 1))
    ],
}  # fmt: skip


def model(layers, mask):
    return [flex_attention(*qkv, block_mask=mask, enable_gqa=qkv[0].shape[1] != qkv[1].shape[1]) for qkv in layers]


class Measured:
    """One case, in each way."""

    def __init__(self, case):
        self.case = case
        name, (batch, heads, length, dim, kv_heads) = case
        drawn = [inputs(batch, length, heads, kv_heads, dim, torch.bfloat16, "cuda", seed=i) for i in range(LAYERS)]
        self.layers, self.grads = [qkv for qkv, _ in drawn], [grad for _, grad in drawn]
        self.flat = [t for qkv in self.layers for t in qkv]
        self.mask = block_mask(OF_MASKS[name](batch, length, "cuda"), batch, length, "cuda")
        self.run, self.how = {}, {}
        for way, options in WAYS.items():
            self.run[way] = self._compiled(options)
            with collect() as report:
                self.step(way)
            self.how[way] = str(report.calls[0].reason or "+".join(report.calls[0].strategies)) if report.calls else ""

    def _compiled(self, options):
        def fresh(*given):  # a code object that no other way has compiled
            return model(*given)

        code = fresh.__code__.replace(co_name=f"way_{len(self.run)}")
        function = type(fresh)(code, {**globals(), "model": model}, code.co_name, None, fresh.__closure__)
        how = {} if options is None else {"backend": "cudnn_flex", "options": options}
        return torch.compile(function, dynamic=False, **how)

    def step(self, way, backward=True):
        outs = self.run[way](self.layers, self.mask)
        if backward:
            torch.autograd.grad(outs, self.flat, self.grads)

    def timed(self, way, backward):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(IN_A_ROW):
            self.step(way, backward)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / IN_A_ROW / LAYERS

    def on_device(self, way):
        """Milliseconds that kernels take in the forward, and in the backward."""
        found = []
        for _ in range(PROFILED):
            with profile(activities=[ProfilerActivity.CUDA]) as forward:
                outs = self.run[way](self.layers, self.mask)
                torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as backward:
                torch.autograd.grad(outs, self.flat, self.grads)
                torch.cuda.synchronize()
            found.append([kernels_of(p) / LAYERS for p in (forward, backward)])
        return [min(column) for column in zip(*found, strict=True)]

    def times(self):
        """Of each way: forward, both, and of kernels."""
        taken = {key: [] for key in itertools.product(WAYS, (False, True))}
        for _ in range(WARM_UP + REPEATS):
            for way, backward in taken:
                taken[way, backward].append(self.timed(way, backward))
        median = {key: statistics.median(times[WARM_UP:]) for key, times in taken.items()}
        return {way: (median[way, False], median[way, True], *self.on_device(way)) for way in WAYS}


def kernels_of(profiled):
    on_cuda = [e for e in profiled.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(e.self_device_time_total for e in on_cuda) / 1e3


def work(cases):
    configure(cache=False)
    measured = [Measured(case) for case in cases]
    yield
    for one in measured:
        yield one.case, one.times(), one.how


def told(case, times, how):
    name, (batch, heads, length, dim, kv_heads) = case
    cells = [f"{way} {f:.3f} {b:.3f} ({kf:.3f} {kb:.3f})" for way, (f, b, kf, kb) in times.items()]
    forced = [f"{way}: {how[way]}" for way in ("graphs", "lists") if "options" in how[way] or len(how[way]) > 40]
    ran = "; ".join([f"default runs by {how['default']}", *forced])
    return f"{name:<18} {batch}, {length}, {heads}/{kv_heads}, {dim:<4} {' | '.join(cells)} | {ran}"


def means(results):
    """Geometric means of one way's times / another's, of forward and both as called and of both as kernels."""
    lines = []
    for one, other in (("inductor", "lists"), ("graphs", "lists"), ("inductor", "default"), ("lists", "default")):
        ratios = [
            (times[one][0] / times[other][0], times[one][1] / times[other][1],
             times[one][2] / times[other][2], times[one][3] / times[other][3])
            for _, times, _ in results
        ]  # fmt: skip
        columns = [math.exp(statistics.fmean(map(math.log, column))) for column in zip(*ratios, strict=True)]
        least = min(r[1] for r in ratios)
        cells = "forward {:.2f}, both {:.2f}, kernels {:.2f} {:.2f}".format(*columns)
        lines.append(f"{one} / {other}: {cells}; the least of both {least:.2f}")
    return lines


def main(names):
    cases = [case for name in names for case in SETS[name]]
    results = []
    for result in in_turn(work, [cases[i : i + CASES] for i in range(0, len(cases), CASES)]):
        if isinstance(result, str):
            print(result, flush=True)
            continue
        results.append(result)
        print(told(*result), flush=True)
    if results:
        print("\n".join(means(results)))


if __name__ == "__main__":
    main(sys.argv[1:] or ["masks"])
