"""Times attention through torch.compile, cudnn_flex beside Inductor, in one run, interleaved.

    python3 -m tests.gpu.bench [--shape B,H,HKV,S,D ...] [--mods NAME ...] [--repeats N] [--csv FILE]
    python3 -m tests.gpu.bench --forty [--warm 12] [--csv FILE]      eight shapes x five mods

Prints, for each mod, the milliseconds a call of forward, backward and both, and the ratio Inductor / cudnn_flex;
last the geometric means. One sample is CUDA-event time, divided by the number of calls, around up to CALLS calls and
then one call of autograd for all of them, as a model of so many layers has it; the median of many samples counts, the
backends take turns. Queries, keys and values are views of [B, S, H, D] tensors, as projections give them, and so are
the output and its gradient.
"""

import argparse
import csv
import math
import statistics
import subprocess
import sys

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile.report import collect
from tests.mods import ALL, BY_BATCH, EIGHT, FIVE, MODS

BACKENDS = ("inductor", "cudnn_flex")
CALLS, LONGEST, WARM_UP = 10, 30, 6  # at most; milliseconds of a sample; samples that do not count


def timed(run):
    """Milliseconds of a run, and its result."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end), result


def compiled(name, shape, dtype, options, mode=None):
    """The functions by backend, what draws q, k, v and a gradient, and the report."""
    batch, heads, kv_heads, length, head_dim = shape
    score_mod, mask_mod = ALL[name](heads, length, "cuda")
    entries = batch if name in BY_BATCH else None
    block_mask = create_block_mask(mask_mod, entries, None, length, length, device="cuda") if mask_mod else None

    def call(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return flex_attention(q, k, v, score_mod, block_mask, enable_gqa=heads != kv_heads).transpose(1, 2)

    def draw():
        q, k, v, grad = (
            torch.randn(batch, length, h, head_dim, device="cuda", dtype=dtype)
            for h in (heads, kv_heads, kv_heads, heads)
        )
        return tuple(torch.nn.Parameter(t) for t in (q, k, v)), grad

    functions = {}
    for backend in BACKENDS:
        torch._dynamo.reset()
        with collect() as report:
            how = {"options": {**options, "mode": mode}} if backend == "cudnn_flex" else {"mode": mode}
            functions[backend] = torch.compile(call, backend=backend, dynamic=False, **how)
            step(functions[backend], [draw()])
    return functions, draw, report


def step(function, layers):
    """A step of layers that do not depend on each other: all forwards, then one call of autograd."""
    torch.compiler.cudagraph_mark_step_begin()
    backward([function(*qkv) for qkv, _ in layers], layers)


def backward(outs, layers):
    torch.autograd.grad(outs, [t for qkv, _ in layers for t in qkv], [grad for _, grad in layers])


def measure(name, shape, dtype, repeats, options, mode=None):
    """Medians in milliseconds a call, by backend and part, and what became of the call."""
    functions, draw, report = compiled(name, shape, dtype, options, mode)
    times = {(b, part): [] for b in BACKENDS for part in ("fwd", "bwd", "both")}
    layers = [draw()]
    for repeat in range(WARM_UP + repeats):
        for backend, function in functions.items():
            fwd = bwd = math.nan
            if mode != "reduce-overhead":  # under which an output is overwritten by the next call's
                fwd, outs = timed(lambda f=function: [f(*qkv) for qkv, _ in layers])
                bwd, _ = timed(lambda o=outs: backward(o, layers))
            both, _ = timed(lambda f=function: step(f, layers))
            if repeat >= WARM_UP:
                for part, value in (("fwd", fwd), ("bwd", bwd), ("both", both)):
                    times[backend, part].append(value / len(layers))
        if repeat == WARM_UP - 3 and mode != "reduce-overhead":
            layers = [draw() for _ in range(max(1, min(CALLS, round(LONGEST / both))))]
    medians = {key: statistics.median(values) for key, values in times.items()}
    call = report.calls[0]
    return medians, str(call.reason) if call.reason else "+".join(call.strategies)


def warm(processes):
    """Compiles all cases in other processes at once, for their caches' sake: this one measures alone."""
    command = [sys.executable, "-m", "tests.gpu.bench", *sys.argv[1:], "--only-compile"]
    running = [subprocess.Popen([*command, f"{i}/{processes}"]) for i in range(processes)]
    codes = [process.wait() for process in running]
    if any(codes):
        sys.exit("bench: a process that compiled ahead failed")


def only_compile(arguments):
    first, step_size = map(int, arguments.only_compile.split("/"))
    cases = [(tuple(map(int, text.split(","))), name) for text in arguments.shape for name in arguments.mods]
    for shape, name in cases[first::step_size]:
        compiled(name, shape, torch.bfloat16, {"lower": arguments.lower}, arguments.mode)


def plot(rows, path):
    """Bars of the ratio Inductor / cudnn_flex by mod, forward and backward."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    for offset, column, label, color in ((-0.2, -3, "forward", "#8fb58a"), (0.2, -2, "backward", "#2f6f4f")):
        places = [i + offset for i in range(len(rows))]
        bars = axes.bar(places, [float(r[column]) for r in rows], 0.38, label=label, color=color)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [r[1].replace(" + ", "\n+ ") for r in rows], fontsize=8)
    axes.set_ylabel("times as fast as Inductor")
    axes.set_title(f"flex_attention through torch.compile, B, H, Hkv, S, D = {rows[0][0]}, bfloat16", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", default=["2,16,16,4096,128"])
    parser.add_argument("--mods", nargs="*", default=list(MODS), choices=list(ALL))
    parser.add_argument("--forty", action="store_true", help="the five mods at the eight shapes of README's table")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--mode", choices=("reduce-overhead",), help="CUDA graphs, for both; forward + backward only")
    parser.add_argument("--lower", default="when_faster", choices=("when_faster", "always"))
    parser.add_argument("--csv", help="file for the table")
    parser.add_argument("--plot", help="file for a bar chart (PNG; needs matplotlib)")
    parser.add_argument("--warm", type=int, default=0, help="processes that fill Inductor's caches before")
    parser.add_argument("--only-compile", help=argparse.SUPPRESS)  # I/N: every N-th case from the I-th on
    arguments = parser.parse_args()
    if arguments.forty:
        arguments.shape, arguments.mods = EIGHT, FIVE
    if not torch.cuda.is_available():
        sys.exit("bench: no NVIDIA GPU here; speed is only measured on one")
    if arguments.only_compile:
        only_compile(arguments)
        return
    warm(arguments.warm)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "cuDNN", torch.backends.cudnn.version())
    rows, ratios = [], []
    for text in arguments.shape:
        shape = tuple(map(int, text.split(",")))
        for name in arguments.mods:
            options = {"lower": arguments.lower}
            medians, how = measure(name, shape, torch.bfloat16, arguments.repeats, options, arguments.mode)
            ratio = {p: medians["inductor", p] / medians["cudnn_flex", p] for p in ("fwd", "bwd", "both")}
            ratios.append(ratio)
            row = [text, name, how]
            row += [f"{medians[b, p]:.3f}" for p in ("fwd", "bwd", "both") for b in BACKENDS]
            row += [f"{ratio[p]:.2f}" for p in ("fwd", "bwd", "both")]
            rows.append(row)
            print("  ".join(row), flush=True)
    for part in ("fwd", "bwd", "both"):
        print(f"geometric mean {part}: {math.exp(statistics.fmean(math.log(r[part]) for r in ratios)):.2f}")
    if arguments.plot:
        plot(rows, arguments.plot)
    if arguments.csv:
        header = ["shape", "mod", "strategies"]
        header += [f"{b}_{p}_ms" for p in ("fwd", "bwd", "both") for b in BACKENDS] + ["fwd_x", "bwd_x", "both_x"]
        with open(arguments.csv, "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    main()
