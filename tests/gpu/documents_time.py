"""Times packed documents with new ids every step, forward and backward: `python3 -m tests.gpu.documents_time [LOG]`.

Knows nothing of right numbers (tests/gpu/test_documents.py). Each row is Inductor's time / ours, medians of interleaved
steps, milliseconds. A step has new document ids and a new BlockMask of them, and everything that belongs to it counts:

    a layer         a step of one layer, with `create_block_mask`, compiled as torch recommends
    of 12           the same of twelve layers that share the mask, per layer
    kernels         twelve layers less one, per layer: what a layer takes by itself

and what the host spends on a call of ours, microseconds, by its mean over calls in a row that the GPU is not behind of.
"""

import functools
import math
import statistics
import sys
import time
import traceback

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile.report import collect
from tests.documents import causal_documents, runs_of

CASES = {  # B, S, H, Hkv, documents
    "B2 S4096, 16 docs": (2, 4096, 16, 16, 16), "B1 S8192, 8 docs": (1, 8192, 16, 16, 8),
    "B1 S8192, 32 docs": (1, 8192, 16, 16, 32), "B1 S8192, 128 docs": (1, 8192, 16, 16, 128),
    "B2 S4096, 16 docs, GQA": (2, 4096, 32, 8, 16), "B1 S8192, 32 docs, GQA": (1, 8192, 32, 8, 32),
}  # fmt: skip
DIM, WARM_UP, REPEATS, LAYERS = 128, 4, 12, 12
compiled_mask = functools.cache(lambda: torch.compile(create_block_mask, dynamic=False))


def packed(seed, batch, length, count):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([runs_of(count, length, generator) for _ in range(batch)]).cuda()


def model(layers):
    def attend(q, k, v, mask):
        for _ in range(layers):
            q = q + flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return q

    return attend


def functions(layers):
    torch._dynamo.reset()
    compiled_mask.cache_clear()
    how = {"cache": False, "intervals": True, **({"lower": "always"} if layers == 1 else {})}
    ours = torch.compile(model(layers), backend="cudnn_flex", dynamic=False, options=how)
    return {"inductor": torch.compile(model(layers), dynamic=False), "ours": ours}


def steps(case, layers):
    """Milliseconds a step of both, and how ours ran."""
    batch, length, heads, kv_heads, count = case
    draw = lambda h: torch.randn(batch, length, h, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)  # noqa: E731
    qkv = [draw(h).requires_grad_() for h in (heads, kv_heads, kv_heads)]
    grad, compiled = draw(heads), functions(layers)
    times = {name: [] for name in compiled}
    with collect() as report:
        for step in range(WARM_UP + REPEATS):
            ids = packed(step, batch, length, count)
            for name, function in compiled.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                start.record()
                mask = compiled_mask()(causal_documents(ids), batch, None, length, length, device="cuda")
                torch.autograd.grad(function(*qkv, mask), qkv, grad)
                end.record()
                end.synchronize()
                if step >= WARM_UP:
                    times[name].append(start.elapsed_time(end))
    call = next(c for c in report.calls)
    how = str(call.reason) if call.reason else "+".join(call.strategies)
    return statistics.median(times["inductor"]), statistics.median(times["ours"]), how


def measure(name, case, log):
    one, many = steps(case, 1), steps(case, LAYERS)
    by_layer = [m / LAYERS for m in many[:2]]
    alone = [(m - o) / (LAYERS - 1) for m, o in zip(many[:2], one[:2], strict=True)]
    rows = {"a layer": (*one[:2], one[2]), "of 12": (*by_layer, many[2]), "kernels": (*alone, many[2])}
    ratios = {}
    for what, (theirs, ours, how) in rows.items():
        ratios[what] = theirs / ours
        print(f"{name}, {what}: {theirs:.3f} / {ours:.3f} ms, {theirs / ours:.2f}x ({how})", file=log, flush=True)
    return ratios


def host_times():
    """Of a call that is so small that the GPU never keeps the host waiting, and of making its list."""
    from cudnn_flex_compile.kernels import cuda, tiles

    batch, length, kept = 1, 512, {}
    draw = lambda: torch.randn(batch, length, 2, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)  # noqa: E731
    qkv, ids = [draw().requires_grad_() for _ in range(3)], packed(0, batch, length, 4)
    mask = create_block_mask(causal_documents(ids), batch, None, length, length)
    watched = {"list of tiles": (tiles, "make"), "forward": (cuda, "forward"), "backward": (cuda, "backward")}
    originals = {name: getattr(*where) for name, where in watched.items()}

    def keep(name, *args):
        kept[name] = functools.partial(originals[name], *args)
        return kept[name]()

    try:
        for name, where in watched.items():
            setattr(*where, functools.partial(keep, name))
        out = functions(1)["ours"](*qkv, mask)
        torch.autograd.grad(out, qkv, torch.randn_like(out))
    finally:
        for name, where in watched.items():
            setattr(*where, originals[name])
    for name, call in kept.items():
        with torch.no_grad():
            print(f"host, {name}: {microseconds(call, 50):.0f} us")


def microseconds(call, count):
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    taken = (time.perf_counter() - start) / count * 1e6
    torch.cuda.synchronize()
    return taken


def main():
    log = open(sys.argv[1], "w") if len(sys.argv) > 1 else sys.stdout  # noqa: SIM115
    found = {}
    for name, case in CASES.items():
        try:
            found[name] = measure(name, case, log)
        except Exception:
            print(f"{name}:\n{traceback.format_exc()}", file=log, flush=True)
    try:
        host_times()
    except Exception:
        traceback.print_exc()
    print(f"{'Inductor / ours':<24} {'a layer':>8} {'of 12':>8} {'kernels':>8}")
    for name, ratios in found.items():
        print(f"{name:<24} " + " ".join(f"{ratio:8.2f}" for ratio in ratios.values()))
    if found:
        columns = zip(*(ratios.values() for ratios in found.values()), strict=True)
        means = [math.exp(statistics.fmean(map(math.log, column))) for column in columns]
        print(f"{'geometric mean':<24} " + " ".join(f"{mean:8.2f}" for mean in means))


if __name__ == "__main__":
    main()
