"""Seconds from the first call of a model of 12 layers (soft cap, causal, window in turn) to its gradients.

    python3 -m tests.gpu.compile_time [--rounds 3] [--layers 12] [--length 2048]

Each figure is the median over processes: Inductor's flex_attention, cudnn_flex with an empty cache folder (cold), and
with the folder that a process before it filled (warm). Torch's own caches are switched off in all. The layers are
attention alone, from one tensor of queries, keys and values each, so that the inner backend has little to compile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from tests.gpu.turns import measuring
from tests.gpu.unattended import line_of

RUNS = {"inductor": "inductor", "cold": "cudnn_flex", "warm": "cudnn_flex"}


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

    torch.cuda.synchronize()
    start = time.perf_counter()
    with collect() as report:
        torch.compile(model, backend=backend)(x).sum().backward()
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    ours = {"counts": report.counts, "seconds": report.seconds, **cache_info()._asdict()}
    print(json.dumps({"elapsed": elapsed, "lowered": len(report.lowered), **ours}))


def child(name, folder, given):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CUDNN_FLEX_")}
    environment |= {"CUDNN_FLEX_CACHE_DIR": folder, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    with tempfile.TemporaryDirectory() as code:
        environment |= {"TORCHINDUCTOR_CACHE_DIR": code, "TRITON_CACHE_DIR": f"{code}/triton"}
        command = [sys.executable, "-m", "tests.gpu.compile_time", "--run", RUNS[name]]
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
        print(f"{name:9} {statistics.median(seconds):6.2f} s ({min(seconds):.2f} to {max(seconds):.2f})", results[-1])
    median = {name: statistics.median(r["elapsed"] for r in results) for name, results in found.items()}
    for name, other in (("cold", "inductor"), ("warm", "cold")):
        if {name, other} <= set(median):
            print(f"{name} / {other} {median[name] / median[other]:.2f}")


if __name__ == "__main__":
    main()
