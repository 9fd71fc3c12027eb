"""Seconds from the first call of a model of 12 layers (soft cap, causal, window in turn) to its gradients.

    python3 -m tests.measure.compile_time [--rounds 3] [--layers 12] [--length 2048]

Each figure is the median over processes. Torch's caches and ours are on, as they are by default, in folders that are
empty at first: those that run again find what a process before has left, torch's caches and plans, or plans alone. The
layers are attention alone, from one tensor of queries, keys and values each, so that the inner backend has little to
compile; all are lowered.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from tests.measure.keep_going import line_of
from tests.measure.measuring_lock import measuring

OURS = "cudnn_flex"
RUNS = {  # the backend, and the folders of torch's caches and of plans
    "inductor": ("inductor", "a", "none"),
    "inductor again": ("inductor", "a", "none"),
    "cold": (OURS, "b", "plans"),
    "plans kept": (OURS, "c", "plans"),
    "again": (OURS, "b", "plans"),
}
RATIOS = (("cold", "inductor"), ("again", "cold"), ("again", "inductor again"))


def measure(backend, layers, length):
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from cudnn_flex_compile import cache_info, collect
    from cudnn_flex_compile.bench.mods import causal, sliding, softcap

    kinds = ((softcap(20.0), causal), (None, causal), (None, sliding(length // 4)))
    masks = [create_block_mask(mask, None, None, length, length, device="cuda") for _, mask in kinds]
    shape = (2, 16, length, 128)
    x = [[torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)] for _ in kinds]

    def model(x):
        total = 0
        for layer in range(layers):
            kind = layer % len(kinds)
            total = total + flex_attention(*x[kind], kinds[kind][0], masks[kind])
        return total

    options = {"options": {"lower": "always"}} if backend == OURS else {}
    torch.cuda.synchronize()
    start = time.perf_counter()
    with collect() as report:
        torch.compile(model, backend=backend, **options)(x).sum().backward()
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    ours = {"counts": report.counts, "seconds": report.seconds, **cache_info()._asdict()}
    print(json.dumps({"elapsed": elapsed, "lowered": len(report.lowered), **ours}))


def child(name, folder, given):
    backend, code, plans = RUNS[name]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CUDNN_FLEX_")}
    environment |= {"CUDNN_FLEX_CACHE_DIR": f"{folder}/{plans}", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/{code}"}
    environment["TRITON_CACHE_DIR"] = f"{folder}/{code}/triton"
    command = [sys.executable, "-m", "tests.measure.compile_time", "--run", backend]
    command += ["--layers", str(given.layers), "--length", str(given.length)]
    out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--run")
    given = parser.parse_args()
    if given.run:
        return measure(given.run, given.layers, given.length)
    found = {name: [] for name in RUNS}
    for _ in range(given.rounds):
        with measuring(), tempfile.TemporaryDirectory() as folder:
            for name in RUNS:
                line_of(name, lambda n, f=folder: found[n].append(child(n, f, given)) or found[n][-1]["elapsed"])
    found = {name: results for name, results in found.items() if results}
    for name, results in found.items():
        seconds = [r["elapsed"] for r in results]
        print(f"{name:14} {statistics.median(seconds):6.2f} s ({min(seconds):.2f} to {max(seconds):.2f})", results[-1])
    median = {name: statistics.median(r["elapsed"] for r in results) for name, results in found.items()}
    for name, other in RATIOS:
        if {name, other} <= set(median):
            print(f"{name} / {other} {median[name] / median[other]:.2f}")
    ours = {name: results for name, results in found.items() if RUNS[name][0] == OURS}
    lowering = {name: statistics.median(r["seconds"]["lower"] for r in results) for name, results in ours.items()}
    print("of which our own part, with plans and checks:", {name: round(s, 2) for name, s in lowering.items()})


if __name__ == "__main__":
    main()
