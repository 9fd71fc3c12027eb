"""Times a layer of attention with learnt sinks: `python3 -m tests.measure.lse_time [--dtype float16] [LAYER ...]`.

Knows nothing of right numbers (tests/gpu/test_lse_gradient.py). Inductor's time / ours, forward and backward, medians,
interleaved: a row for each case as it comes, with the keys that a query sees on average, which is what LSE_COST of
passes/decide/cost_model.py is about. Several processes compile, and measure in turn.
"""

import argparse
import itertools
import statistics
import sys

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile.bench.measure import on_device
from cudnn_flex_compile.bench.mods import causal, padded, sliding, softcap
from cudnn_flex_compile.report.report import collect
from tests.measure.keep_going import by_case
from tests.measure.measuring_lock import in_turn

SHAPES = ((2, 16, 16, 4096, 128), (2, 64, 8, 4096, 64))  # the second with the heads of gpt-oss
WINDOWS = {f"window {n}": sliding(n - 1) for n in (1024, 512, 256, 128)}
LAYERS = {
    name + how: (score_mod, mask_mod)
    for how, score_mod in {"": None, " + soft cap": softcap(20.0)}.items()
    for name, mask_mod in {"full": None, "causal": causal, **WINDOWS}.items()
}  # fmt: skip
PADDED = "padded lengths"  # if asked for
BACKENDS = {"inductor": {}, "cudnn_flex": {"options": {"lower": "always"}}}
WARM_UP, REPEATS, CALLS = 3, 12, 3
PROCESSES = 8


def mods(layer, shape):
    """score_mod and mask_mod."""
    batch, _, _, length, _ = shape
    if layer == PADDED:
        return None, padded(torch.linspace(length // 2, length, batch, device="cuda").int())
    return LAYERS[layer]


def keys_seen(mask_mod, shape):
    """By a query, on average."""
    batch, _, _, length, _ = shape
    b, q, kv = (torch.arange(n, device="cuda") for n in (batch, length, length))
    seen = True if mask_mod is None else mask_mod(b.view(-1, 1, 1), 0, q.view(-1, 1), kv).float().mean()
    return float(seen) * length


def compiled(layer, shape, backend):
    batch, heads, kv_heads, length, _ = shape
    score_mod, mask_mod = mods(layer, shape)
    entries = batch if layer == PADDED else None
    mask = create_block_mask(mask_mod, entries, None, length, length, device="cuda") if mask_mod else None

    def attend(q, k, v, sinks):
        out, lse = flex_attention(q, k, v, score_mod, mask, enable_gqa=heads != kv_heads, return_lse=True)
        return out * torch.sigmoid(lse - sinks.view(-1, 1)).unsqueeze(-1).to(out.dtype)

    return torch.compile(attend, backend=backend, dynamic=False, **BACKENDS[backend])


def first_calls(case):
    """What is left to be timed: both functions, their inputs, a gradient, and the report."""
    layer, shape, dtype = case
    batch, heads, kv_heads, length, dim = shape
    draw = lambda h: torch.randn(batch, length, h, dim, device="cuda", dtype=dtype).transpose(1, 2)  # noqa: E731
    leaves = [draw(h).requires_grad_() for h in (heads, kv_heads, kv_heads)]
    leaves.append(torch.zeros(heads, device="cuda", requires_grad=True))
    grad, functions = draw(heads), {}
    with collect() as report:
        for backend in BACKENDS:
            functions[backend] = compiled(layer, shape, backend)
            torch.autograd.grad(functions[backend](*leaves), leaves, grad)
    return functions, leaves, grad, report


def measured(case, functions, leaves, grad, report):
    """A row of the table."""
    layer, shape, _ = case
    times = {backend: [] for backend in functions}
    for repeat in range(WARM_UP + REPEATS):
        for backend, function in functions.items():
            step = lambda f=function: [torch.autograd.grad(f(*leaves), leaves, grad) for _ in range(CALLS)]  # noqa: E731
            taken = on_device(step)[0] / CALLS
            times[backend] += [taken] if repeat >= WARM_UP else []
    theirs, ours = (statistics.median(times[backend]) for backend in BACKENDS)
    (call,) = report.calls
    how = str(call.reason) if call.reason else "+".join(call.strategies)
    seen = keys_seen(mods(layer, shape)[1], shape)
    return f"{layer:22} {shape!s:24} {seen:6.0f} keys {theirs / ours:6.2f}x  {theirs:.3f} / {ours:.3f} ms  {how}"


def work(cases):
    """The rows of some cases of one dtype, a generator for in_turn."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4 * len(cases)
    return by_case(cases, first_calls, measured)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("layers", nargs="*", help=", ".join([*LAYERS, PADDED]))
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("lse_time: no NVIDIA GPU here")
    cases = list(itertools.product(given.layers or LAYERS, SHAPES, [getattr(torch, given.dtype)]))
    for line in in_turn(work, [part for i in range(PROCESSES) if (part := cases[i::PROCESSES])]):
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
