"""Times a layer of attention with learnt sinks: `python3 -m tests.gpu.lse_time [--dtype float16]`.

Knows nothing of right numbers (tests/gpu/test_lse_gradient.py). Inductor's time / ours, forward and backward, medians,
interleaved.
"""

import argparse
import functools
import itertools
import statistics
import sys

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile.bench.measure import on_device
from cudnn_flex_compile.bench.mods import causal, padded, sliding, softcap
from cudnn_flex_compile.report import collect
from tests.gpu.unattended import lines

SHAPES = ((2, 64, 8, 4096, 64), (2, 16, 16, 4096, 64), (2, 16, 16, 4096, 128), (1, 32, 8, 8192, 128))
LAYERS = {
    "full": (None, causal), "sliding": (None, sliding(127)), "soft cap + causal": (softcap(20.0), causal),
    "padded lengths": (None, padded),
}  # fmt: skip
WARM_UP, REPEATS, CALLS = 5, 20, 5


def compiled(layer, shape, backend):
    batch, heads, kv_heads, length, _ = shape
    score_mod, mask_mod = LAYERS[layer]
    entries = batch if mask_mod is padded else None
    if entries:
        mask_mod = padded(torch.linspace(length // 2, length, batch, device="cuda").int())
    mask = create_block_mask(mask_mod, entries, None, length, length, device="cuda")

    def attend(q, k, v, sinks):
        out, lse = flex_attention(q, k, v, score_mod, mask, enable_gqa=heads != kv_heads, return_lse=True)
        return out * torch.sigmoid(lse - sinks.view(-1, 1)).unsqueeze(-1).to(out.dtype)

    options = {"lower": "always", "cache": False}
    how = {"options": options} if backend == "cudnn_flex" else {}
    return torch.compile(attend, backend=backend, dynamic=False, **how)


def measure(dtype, case):
    layer, shape = case
    batch, heads, kv_heads, length, dim = shape
    torch._dynamo.reset()
    draw = lambda h: torch.randn(batch, length, h, dim, device="cuda", dtype=dtype).transpose(1, 2)  # noqa: E731
    leaves = [draw(h).requires_grad_() for h in (heads, kv_heads, kv_heads)]
    leaves.append(torch.zeros(heads, device="cuda", requires_grad=True))
    grad, functions = draw(heads), {}
    with collect() as report:
        for backend in ("inductor", "cudnn_flex"):
            functions[backend] = compiled(layer, shape, backend)
            torch.autograd.grad(functions[backend](*leaves), leaves, grad)
    times = {backend: [] for backend in functions}
    for repeat in range(WARM_UP + REPEATS):
        for backend, function in functions.items():
            step = lambda f=function: [torch.autograd.grad(f(*leaves), leaves, grad) for _ in range(CALLS)]  # noqa: E731
            if repeat >= WARM_UP:
                times[backend].append(on_device(step)[0] / CALLS)
            else:
                step()
    theirs, ours = (statistics.median(times[backend]) for backend in ("inductor", "cudnn_flex"))
    (call,) = report.calls
    how = str(call.reason) if call.reason else "+".join(call.strategies)
    return f"{layer}, {shape}, {how}: {theirs:.3f} / {ours:.3f} ms, {theirs / ours:.2f}x"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    dtype = getattr(torch, parser.parse_args().dtype)
    return int(not lines(itertools.product(LAYERS, SHAPES), functools.partial(measure, dtype)))


if __name__ == "__main__":
    sys.exit(main())
