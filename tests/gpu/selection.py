"""Where we are faster than Inductor, for the rules by sizes (passes/speed.py): decoding, and short sequences.

    python3 -m tests.gpu.selection [log file] [--processes 8]

Both through torch.compile, ours with lower="always", interleaved: as called, and the device's time alone. Decoding is
the forward without gradients; short sequences are forward + backward. Other processes fill the compile caches first.
"""

import argparse
import contextlib
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import collect
from cudnn_flex_compile.bench.mods import causal, sliding, softcap
from cudnn_flex_compile.engine import timing
from tests.gpu.host_time import microseconds

ROUNDS = 3
OURS, STOCK = "cudnn_flex", "inductor"


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    training: bool
    score_mod: Any = None
    mask_mod: Any = None

    def __str__(self):
        sizes = f"B {self.batch}, H {self.heads}/{self.kv_heads}, q {self.queries}, kv {self.keys}, D {self.dim}"
        return f"{self.name}, {sizes}"


CASES = [
    *(
        Case("decode, soft cap", 8, 32, 8, queries, keys, 128, False, softcap(20.0))
        for queries in (1, 4, 16)
        for keys in (1024, 8192, 32768)
    ),
    *(
        Case(name, 8, 16, 16, length, length, 64, True, score_mod, mask_mod)
        for length in (128, 256, 512)
        for name, score_mod, mask_mod in (
            ("causal", None, causal),
            ("soft cap + causal", softcap(20.0), causal),
            ("soft cap + window", softcap(20.0), sliding(length // 4)),
        )
    ),
]


def steps(case):
    """What a call of each contender is, by name, and how ours runs."""
    torch._dynamo.reset()
    lengths = [(case.heads, case.queries), (case.kv_heads, case.keys), (case.kv_heads, case.keys)]
    q, k, v = (
        torch.randn(case.batch, length, heads, case.dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for heads, length in lengths
    )
    leaves = [t.requires_grad_(case.training) for t in (q, k, v)]
    grad = torch.randn_like(q)
    mask = case.mask_mod and create_block_mask(case.mask_mod, None, None, case.queries, case.keys, device="cuda")

    def call(q, k, v):
        return flex_attention(q, k, v, case.score_mod, mask, enable_gqa=case.heads != case.kv_heads)

    found, how = {}, ""
    for backend, options in ((STOCK, {}), (OURS, {"options": {"lower": "always"}})):
        function = torch.compile(call, backend=backend, dynamic=False, **options)

        def step(function=function):
            out = function(*leaves)
            return torch.autograd.grad(out, leaves, grad) if case.training else out

        with collect() as report:
            step()
        found[backend] = step
        if backend == OURS:
            how = ", ".join(f"kept: {c.reason}" if c.reason else " + ".join(c.strategies) for c in report.calls)
    return found, how


def measured(case):
    with contextlib.nullcontext() if case.training else torch.no_grad():
        found, how = steps(case)
        called = dict.fromkeys(found, float("inf"))
        for _ in range(ROUNDS):
            for name, step in found.items():
                called[name] = min(called[name], microseconds(step) / 1000)
        device = dict(zip(found, timing.milliseconds(list(found.values())), strict=True))
    return called, device, how


def row(case):
    try:
        called, device, how = measured(case)
    except Exception as error:  # one case must not lose the others
        traceback.print_exc()
        return f"| {case} | {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''} | | | |"
    parts = [f"{t[STOCK]:.3f} / {t[OURS]:.3f} ms, {t[STOCK] / t[OURS]:.2f}x" for t in (called, device)]
    return f"| {case} | {parts[0]} | {parts[1]} | {how} |"


def compile_ahead(processes):
    command = [sys.executable, "-m", "tests.gpu.selection", "--only"]
    running = [subprocess.Popen([*command, f"{i}/{processes}"], stdout=subprocess.DEVNULL) for i in range(processes)]
    for process in running:
        process.wait()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("log", nargs="?")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--only", help=argparse.SUPPRESS)  # I/N: compiles every N-th case from the I-th on
    given = parser.parse_args()
    if given.only:
        first, count = map(int, given.only.split("/"))
        for case in CASES[first::count]:
            with contextlib.suppress(Exception), contextlib.nullcontext() if case.training else torch.no_grad():
                steps(case)
        return
    begun = time.perf_counter()
    compile_ahead(given.processes)
    ahead = time.perf_counter() - begun
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    lines = ["| case | as called, Inductor / ours | on the device | ours runs as |", "| --- | --- | --- | --- |"]
    print(*lines, sep="\n", flush=True)
    for case in CASES:
        lines.append(row(case))
        print(lines[-1], flush=True)
        if given.log:
            with open(given.log, "w") as file:
                file.write("\n".join(lines) + "\n")
    print(f"compiled ahead in {ahead:.0f} s, all in {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
