"""Where we are faster than Inductor, beside what the chooser predicts (passes/decide/chooser.py): decoding, and short
sequences.

    python3 -m tests.measure.selection [log file] [--processes 12] [--only decode]

Both through torch.compile, ours with lower="always", interleaved: as called, and the device's time alone. Decoding is
the forward without gradients; short sequences are forward + backward. Several processes compile, and measure in turn.
"""

import argparse
import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import collect
from cudnn_flex_compile.bench.mods import causal, softcap
from cudnn_flex_compile.engine.launch import timing
from tests.measure.keep_going import by_case
from tests.measure.measuring_lock import in_turn

ROUNDS, CALLS = 3, 40
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


SHORT = {"full": (None, None), "causal": (None, causal), "soft cap + causal": (softcap(20.0), causal)}
CASES = [
    *(
        Case(f"decode, {name}", 8, 32, kv_heads, queries, keys, 128, False, score_mod)
        for queries in (1, 4, 16)
        for keys in (1024, 8192, 32768)
        for name, score_mod, kv_heads in (("soft cap", softcap(20.0), 8), ("plain", None, 8), ("plain", None, 32))
    ),
    *(
        Case(name, 16384 // length, 16, 16, length, length, dim, True, *mods)
        for length in (128, 256, 512, 1024)
        for dim in (64, 128)
        for name, mods in SHORT.items()
    ),
    *(Case("full", 64, 16, 16, 197, 197, 64, training) for training in (False, True)),
]


def recording(case):
    return contextlib.nullcontext() if case.training else torch.no_grad()


def compiled(case):
    """What a call of each contender is, by name, and how ours runs."""
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

        with recording(case), collect() as report:
            step()
        found[backend] = step
        if backend == OURS:
            how = ", ".join(f"kept: {c.reason}" if c.reason else " + ".join(c.strategies) for c in report.calls)
    return found, how


def as_called(step):
    """Milliseconds of one of several calls in a row, until the device is through."""
    step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / CALLS * 1e3


def row(case, found, how):
    called = dict.fromkeys(found, float("inf"))
    with recording(case):
        for _ in range(ROUNDS):
            for name, step in found.items():
                called[name] = min(called[name], as_called(step))
        device = dict(zip(found, timing.milliseconds(list(found.values())), strict=True))
    parts = [f"{t[STOCK]:.3f} / {t[OURS]:.3f} ms, {t[STOCK] / t[OURS]:.2f}x" for t in (called, device)]
    return f"| {case} | {parts[0]} | {parts[1]} | {how} |"


def work(mine):
    """The rows of the cases at some places, a generator for in_turn."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4 * len(CASES)
    return by_case([CASES[i] for i in mine], compiled, row)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("log", nargs="?")
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--only", default="", help="what the names of cases begin with")
    given = parser.parse_args()
    cases = [i for i, case in enumerate(CASES) if case.name.startswith(given.only)]
    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}",
        "",
        "| case | as called, Inductor / ours | on the device | ours runs as |",
        "| --- | --- | --- | --- |",
    ]
    print(*lines, sep="\n", flush=True)
    for line in in_turn(work, [part for i in range(given.processes) if (part := cases[i :: given.processes])]):
        lines.append(line)
        print(line, flush=True)
        if given.log:
            Path(given.log).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
