"""Times packed documents with new ids every step, forward and backward: `python3 -m tests.measure.documents_time
[LOG]`.

Knows nothing of right numbers (tests/gpu/test_documents.py). A step has new document ids and a new BlockMask of them,
and everything that belongs to it counts. Each layer has queries, keys and values of its own; all share the BlockMask.
Each row is Inductor's milliseconds / ours, medians of interleaved steps, with every call run by intervals:

    a layer         a step of one layer, with `create_block_mask`, compiled as torch recommends
    of 12           the same of twelve layers, per layer
    by itself       twelve layers less one, per layer: what a layer takes beside what is done once a step
    set-up          one layer less that: what is done once a step
    host            of that one layer's step, until the host is through
    forward, backward   what the device computes for a layer, and set-up of the step in the forward, by the profiler

A process for each shape compiles, and measures in turn, some steps in a row, as in training nobody waits for a step.
The last tables are the ratios, with what the chooser predicts of each case (passes/decide/chooser.py), and the line of
passes/decide/step_times.json.
"""

import functools
import itertools
import math
import statistics
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.profiler import ProfilerActivity, profile

from cudnn_flex_compile import configure
from cudnn_flex_compile.engine.tiles.recording import recording_of
from cudnn_flex_compile.engine.tiles.tile_list import Geometry
from cudnn_flex_compile.engine.tiles.tiler import tiler_of
from cudnn_flex_compile.kernels.row_tables import Recipe
from cudnn_flex_compile.passes.decide import cost_inputs, cost_model
from cudnn_flex_compile.report.report import collect
from cudnn_flex_compile.scoremod import ir, optable
from cudnn_flex_compile.scoremod.masks.intervals import NARROW
from tests.measure.measuring_lock import in_turn
from tests.support.documents import causal_documents, runs_of

PREFIX = 512
SHAPES = {  # B, S, H, Hkv: numbers of documents, or another mask, the same at every step. Each shape is compiled once
    (2, 4096, 16, 16): (16, "prefix"), (1, 8192, 16, 16): (8, 32, 128), (2, 4096, 32, 8): (16,),
    (1, 8192, 32, 8): (32,), (1, 16384, 16, 16): (32,),
}  # fmt: skip
DIM, LAYERS, WARM_UP, REPEATS, IN_A_ROW, PROFILED = 128, 12, 2, 7, 3, 2
NAMES = ("inductor", "ours")
Pair = tuple[float, float]  # Inductor's, and ours
compiled_mask = functools.cache(lambda: torch.compile(create_block_mask, dynamic=False))


@dataclass
class Times:
    """Milliseconds of steps of so many layers."""

    step: Pair
    host: Pair
    forward: Pair
    backward: Pair
    share: float
    how: str


def packed(seed, batch, length, count):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([runs_of(count, length, generator) for _ in range(batch)]).cuda()


def prefix(b, h, q, kv):
    return (q >= kv) | (kv < PREFIX)


def model(layers, mask):
    return [flex_attention(*qkv, block_mask=mask, enable_gqa=qkv[0].shape[1] != qkv[1].shape[1]) for qkv in layers]


class Model:
    """Both ways to run so many layers of one shape."""

    def __init__(self, shape, count):
        self.batch, self.length, heads, kv_heads = shape
        self.leaves = [[self.draw(h).requires_grad_() for h in (heads, kv_heads, kv_heads)] for _ in range(count)]
        self.grads, self.flat = [self.draw(heads) for _ in range(count)], [t for qkv in self.leaves for t in qkv]
        configure(cache=False)
        ours = {"lower": "always"}
        theirs = torch.compile(model, dynamic=False)
        self.run = {"inductor": theirs, "ours": torch.compile(model, backend="cudnn_flex", dynamic=False, options=ours)}

    def compile(self, counts):
        for documents, name, step in itertools.product(counts, NAMES, range(2)):
            self.timed(name, [self.mask(documents, step)])

    def draw(self, heads):
        return torch.randn(self.batch, self.length, heads, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    def mask(self, documents, step):
        """What makes the BlockMask of a step."""
        mod = prefix
        if documents != "prefix":
            mod = causal_documents(packed(step, self.batch, self.length, documents))
        return functools.partial(compiled_mask(), mod, self.batch, None, self.length, self.length, device="cuda")

    def timed(self, name, makers):
        """Milliseconds of a step, of one for each BlockMask, and of the host in it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        begin = time.perf_counter()
        for make in makers:
            torch.autograd.grad(self.run[name](self.leaves, make()), self.flat, self.grads)
        host = 1e3 * (time.perf_counter() - begin)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / len(makers), host / len(makers)

    def on_device(self, name, mask):
        """Milliseconds that kernels take in the forward, and in the backward."""
        found = []
        for _ in range(PROFILED):
            with profile(activities=[ProfilerActivity.CUDA]) as forward:
                outs = self.run[name](self.leaves, mask)
                torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as backward:
                torch.autograd.grad(outs, self.flat, self.grads)
                torch.cuda.synchronize()
            found.append([kernels_of(p) for p in (forward, backward)])
        return [min(column) for column in zip(*found, strict=True)]

    def times(self, documents):
        steps = {name: [] for name in NAMES}
        with collect() as report:
            for first in range(0, IN_A_ROW * (WARM_UP + REPEATS), IN_A_ROW):
                makers = [self.mask(documents, step) for step in range(first, first + IN_A_ROW)]
                for name in NAMES:
                    steps[name].append(self.timed(name, makers))
        medians = [[statistics.median(c) for c in zip(*steps[name][WARM_UP:], strict=True)] for name in NAMES]
        mask = makers[0]()
        device = [self.on_device(name, mask) for name in NAMES]
        pairs = [tuple(column) for column in zip(*medians, strict=True)] + list(zip(*device, strict=True))
        how = "as before" if not report.calls else str(report.calls[0].reason or "+".join(report.calls[0].strategies))
        return Times(*pairs, 1 - mask.sparsity() / 100, how)


def kernels_of(profiled):
    on_cuda = [e for e in profiled.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(e.self_device_time_total for e in on_cuda) / 1e3


def by_layer(one, many):
    return tuple((m - o) / (LAYERS - 1) for o, m in zip(one, many, strict=True))


def less(one, other):
    return tuple(a - b for a, b in zip(one, other, strict=True))


def rows_of(one, many):
    """All rows of a case."""
    alone, forward, backward = (
        by_layer(getattr(one, n), getattr(many, n)) for n in ("step", "forward", "backward")
    )  # fmt: skip
    rows = {
        "a layer": one.step, "of 12": tuple(t / LAYERS for t in many.step), "by itself": alone,
        "set-up": less(one.step, alone), "host": one.host, "forward": forward, "backward": backward,
        "set-up, device": less(one.forward, forward),
    }  # fmt: skip
    return rows


def told(name, times, rows):
    """The rows as text."""
    lines = [f"{name}: {times.share:.1%} of the blocks, {times.how}"]
    for what, (theirs, ours) in rows.items():
        ratio = f"{theirs / ours:.2f}x" if min(theirs, ours) > 0 else ""
        lines.append(f"    {what:<16} {theirs:8.3f} / {ours:8.3f} ms  {ratio}")
    return "\n".join(lines)


def rule(shape, share, layers):
    """Whether so many layers in training are predicted to be faster by lists than by Inductor's kernel."""
    batch, length, heads, kv_heads = shape
    query, key = (torch.empty(batch, h, length, DIM, device="meta") for h in (heads, kv_heads))
    call = SimpleNamespace(query=query, key=key, value=key, blocks=("there",))
    blocks, ways = cost_inputs.Blocks(share, 0.5), ("forward", "backward")
    ids = ir.operand(0, ir.I32, "k")
    program = ir.program(mask=optable.make("ge", ir.index("q"), ids))  # it reads a tensor: each step has a list
    facts = cost_inputs.CostInputs(call, program, (), True, False, blocks, None, ways, layers)
    by_lists = cost_model.ours(facts)
    return by_lists is not None and by_lists.total <= cost_model.inductors(facts).total


def line(points):
    """Of least squares, neither falling nor below nothing."""
    mean_x, mean_y = (statistics.fmean(c) for c in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = max(0.0, sum((x - mean_x) * (y - mean_y) for x, y in points) / spread)
    base = mean_y - slope * mean_x
    if base < 0:
        base, slope = 0.0, sum(x * y for x, y in points) / sum(x * x for x, _ in points)
    return f"[{base:.3f}, {slope:.2f}]"


def print_rule(found):
    """Prints the line of passes/decide/step_times.json, of these measurements."""
    setups = [(s[0] * s[1] ** 2 / 1e9, rows["set-up"][1] - rows["set-up"][0]) for s, _, rows in found.values()]
    print(f'"list": {line(setups)}')


def lists(shape):
    """A list by itself, as it is recorded, and as it is not: on the device, and on the host."""
    batch, length, heads, kv_heads = shape
    geometry = Geometry(batch, heads, kv_heads, length, length, DIM, DIM, 1, True, torch.bfloat16)
    table = torch.full((1, NARROW, batch * length), length, dtype=torch.int32, device="cuda")
    table[:, 0], table[:, 1], table[:, 2] = 0, 0, torch.arange(1, batch * length + 1, device="cuda") % length
    tiler, stream = tiler_of(geometry, 0), torch.cuda.current_stream().cuda_stream
    room = tiler.count(table)[1].with_reserve()
    given = table, torch.zeros(3, dtype=torch.int32, device="cuda")
    layouts = tuple((t.shape, t.dtype) for t in given)
    recording = recording_of(geometry, room, Recipe(), layouts, 0, stream)
    makers = {
        "recorded": recording and functools.partial(recording, given),
        "not recorded": functools.partial(tiler.within, table, room),
    }
    for what, maker in makers.items():
        if maker is not None:
            host, device = microseconds(maker, 20)
            yield f"list, B{batch} S{length} H{heads}/{kv_heads}, {what}: host {host:.0f} us, all {device:.0f} us"


def host_times():
    """Of a call that is so small that the GPU never keeps the host waiting, and of making its list."""
    from cudnn_flex_compile.kernels import cuda, tile_lists

    kept, small = {}, Model((1, 512, 2, 2), 1)
    watched = {"list of tiles": (tile_lists, "begin"), "forward": (cuda, "forward"), "backward": (cuda, "backward")}
    watched["a list that is there"] = (tile_lists, "handle_of")
    originals = {name: getattr(*where) for name, where in watched.items()}

    def keep(name, *args):
        kept[name] = functools.partial(originals[name], *args)
        return kept[name]()

    try:
        for name, where in watched.items():
            setattr(*where, functools.partial(keep, name))
        small.timed("ours", [small.mask(4, 0)])
    finally:
        for name, where in watched.items():
            setattr(*where, originals[name])
    for name, call in kept.items():
        with torch.no_grad():
            yield f"host, {name}: {microseconds(call, 50)[0]:.0f} us"


def microseconds(call, count):
    """Of the host, and until the device is through, per call."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return host / count * 1e6, (time.perf_counter() - start) / count * 1e6


def work(shape):
    """What is measured of a shape, a generator for in_turn: lines of text, and cases (name, shape, share, rows)."""
    torch._dynamo.config.recompile_limit = 64  # all of it is one function
    models = [Model(shape, layers) for layers in (1, LAYERS)]
    for model in models:
        model.compile(SHAPES[shape])
    yield
    for count in SHAPES[shape]:
        name = "B{} S{} H{}/{}".format(*shape) + f", {count if isinstance(count, str) else f'{count} docs'}"
        one, many = (model.times(count) for model in models)
        rows = rows_of(one, many)
        yield told(name, one, rows)
        yield name, shape, one.share, rows
    yield from lists(shape)
    if shape == next(iter(SHAPES)):
        yield from host_times()


def main():
    log, found = open(sys.argv[1], "w") if len(sys.argv) > 1 else sys.stdout, {}  # noqa: SIM115
    for message in in_turn(work, SHAPES):
        if isinstance(message, str):
            print(message, file=log, flush=True)
        else:
            found[message[0]] = message[1:]
    columns = ("a layer", "of 12", "by itself", "forward", "backward")
    print(f"{'Inductor / ours':<26} " + " ".join(f"{c:>9}" for c in columns) + "  by rule: one, twelve")
    ratios = {name: [rows[c][0] / rows[c][1] for c in columns] for name, (_, _, rows) in found.items()}
    for name, row in ratios.items():
        shape, share, _ = found[name]
        run = ", ".join("tile lists" if rule(shape, share, n) else "kept" for n in (1, LAYERS))
        print(f"{name:<26} " + " ".join(f"{ratio:9.2f}" for ratio in row) + f"  {run}")
    if found:
        means = [math.exp(statistics.fmean(map(math.log, column))) for column in zip(*ratios.values(), strict=True)]
        print(f"{'geometric mean':<26} " + " ".join(f"{mean:9.2f}" for mean in means))
        print_rule(found)


if __name__ == "__main__":
    main()
