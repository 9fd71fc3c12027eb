"""Whole attention layers of known models: numbers against float64, and the time of a step beside Inductor's.

    python3 -m tests.measure.accuracy [--length 4096] [--repeats 12] [layer ...]

Each layer is attention as the model has it, with all that its gradients reach. At a length of 1024 the output and every
gradient are compared with float64; an error is given as a multiple of that of stock precision (flex_attention's eager
rounding; for a learnt bias flash attention's, tests/support/dense.py), and none may be beyond 2. At --length, forward
and backward are timed: Inductor's time / ours, medians of samples that take turns, with everything lowered
(lower="always"); the row says whether that is the default. Exit code 1 if a number is off, or a layer fails; where
Inductor's kernel fails, ours is timed alone. Some 60 seconds.
"""

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import configure
from cudnn_flex_compile.bench.measure import on_device
from cudnn_flex_compile.bench.mods import causal, sliding, softcap
from cudnn_flex_compile.config import Options
from cudnn_flex_compile.passes.lower_graph import lower_calls
from cudnn_flex_compile.report.report import collect
from tests.measure.keep_going import lines, tried
from tests.measure.measuring_lock import measuring
from tests.support import dense

ACCURACY_LENGTH, LIMIT = 1024, 2.0
WARM_UP, LONGEST, MOST_CALLS = 4, 20, 10  # samples; milliseconds of a sample, and its calls at most
LOWERED = {"lower": "always"}
CONTENDERS = {"inductor": None, "ours": LOWERED}
WAYS = {**CONTENDERS, "numbers": LOWERED | {"inner_backend": "aot_eager"}}


@dataclass(frozen=True)
class Layer:
    """Attention of one model.

    Attributes:
        shape: batch, query heads, kv heads, head dim.
        mods: length -> a function of what is learnt that gives score_mod and mask_mod.
        learnt: heads -> shapes of the learnt tensors.
        after: (out, lse in natural units, learnt) -> the layer's output; None if that is attention's.
        length: of queries and keys where it is not what is asked for.
    """

    shape: tuple[int, int, int, int]
    mods: Callable
    learnt: Callable = lambda heads: ()
    after: Callable | None = None
    length: int | None = None


def sink(out, lse, learnt):
    """As gpt-oss: a further key, whose score is learnt and whose value is zero."""
    return out * torch.sigmoid(lse - learnt[0].view(-1, 1)).unsqueeze(-1).to(out.dtype)


BUCKETS, FARTHEST = 32, 128


def t5(length):
    """T5's encoder: a learnt bias for each head and bucket of distances."""
    half, exact = BUCKETS // 2, BUCKETS // 4
    distance = torch.arange(length, device="cuda") - torch.arange(length, device="cuda")[:, None]
    near = distance.abs()
    far = exact + (near.clamp(min=1).float() / exact).log() / torch.tensor(FARTHEST / exact).log() * (half - exact)
    bucket = torch.where(near < exact, near, far.long().clamp(max=half - 1)) + half * (distance > 0)
    return lambda learnt: (lambda score, b, h, q, kv: score + learnt[0][h, bucket[q, kv]], None)


WINDOW = 8


def swin(length):
    """Swin's windows: a learnt bias for each head and pair of offsets inside of a window."""
    y, x = (torch.arange(length, device="cuda") // WINDOW, torch.arange(length, device="cuda") % WINDOW)
    offset = (y[:, None] - y + WINDOW - 1) * (2 * WINDOW - 1) + x[:, None] - x + WINDOW - 1
    return lambda learnt: (lambda score, b, h, q, kv: score + learnt[0][h, offset[q, kv]], None)


def fixed(score_mod, mask_mod):
    """Functions that nothing is learnt in."""
    return lambda length: lambda learnt: (score_mod, mask_mod)


GPT_OSS = {"shape": (1, 64, 8, 64), "learnt": lambda heads: ((heads,),), "after": sink}
LAYERS = {
    "gpt-oss, full": Layer(mods=fixed(None, causal), **GPT_OSS),
    "gpt-oss, sliding": Layer(mods=fixed(None, sliding(127)), **GPT_OSS),
    "T5": Layer((8, 12, 12, 64), t5, lambda heads: ((heads, BUCKETS),), length=512),
    "Swin": Layer((512, 8, 8, 32), swin, lambda heads: ((heads, (2 * WINDOW - 1) ** 2),), length=WINDOW**2),
    "Gemma2, full": Layer((1, 16, 8, 256), fixed(softcap(50.0), causal)),
    "Gemma2, sliding": Layer((1, 16, 8, 256), fixed(softcap(50.0), sliding(512))),
}


def leaves(layer, length):
    """Queries, keys, values, then what is learnt (float32), and a gradient of the output."""
    batch, heads, kv_heads, dim = layer.shape
    torch.manual_seed(0)

    def draw(h):
        return torch.randn(batch, length, h, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    learnt = [torch.randn(shape, device="cuda") for shape in layer.learnt(heads)]
    given = [draw(h) for h in (heads, kv_heads, kv_heads)] + learnt
    return [t.requires_grad_() for t in given], draw(heads)


def attend(layer, mods, mask, q, k, v, *learnt):
    score_mod, _ = mods(learnt)
    gqa = layer.shape[1] != layer.shape[2]
    if layer.after is None:
        return flex_attention(q, k, v, score_mod, mask, enable_gqa=gqa)
    out, lse = flex_attention(q, k, v, score_mod, mask, enable_gqa=gqa, return_lse=True)
    return layer.after(out, lse, learnt)


def function_of(layer, length):
    """The layer as a function of its leaves."""
    mods = layer.mods(length)
    _, mask_mod = mods([torch.zeros(shape, device="cuda") for shape in layer.learnt(layer.shape[1])])
    mask = create_block_mask(mask_mod, None, None, length, length, device="cuda") if mask_mod else None
    return functools.partial(attend, layer, mods, mask)


def compiled(layer, length, way):
    """By one of WAYS."""
    configure(cache=False)
    how = {"backend": "inductor"} if WAYS[way] is None else {"backend": "cudnn_flex", "options": WAYS[way]}
    return torch.compile(function_of(layer, length), dynamic=False, **how)


def by_dense(layer, length, given, grad, exact):
    """Output and gradients, one batch entry at a time: pairs take memory."""
    mods = layer.mods(length)
    learnt = [dense.leaf(t, exact) for t in given[3:]]
    rows, scale = [], layer.shape[3] ** -0.5
    for entry in range(grad.shape[0]):
        copies = [dense.leaf(t[entry : entry + 1], exact) for t in given[:3]]
        near = grad[entry : entry + 1]
        out, lse = dense.attention(*copies, *mods(learnt), scale, exact)
        out = out if layer.after is None else layer.after(out, lse, learnt)
        out.backward(near.to(out.dtype))
        rows.append((out.detach(), *(t.grad for t in copies)))
    of_learnt = [t.grad for t in learnt]
    if not exact and learnt and layer.after is None:
        of_learnt = of_biases(layer, mods, given, grad)
    return [torch.cat(parts) for parts in zip(*rows, strict=True)] + of_learnt


def of_biases(layer, mods, given, grad):
    """Gradients of learnt biases as flash attention gives them."""
    own, total = [dense.leaf(t, True) for t in given[3:]], [torch.zeros_like(t) for t in given[3:]]
    for entry in range(grad.shape[0]):
        near = [t[entry : entry + 1] for t in (*given[:3], grad)]
        how = *mods(own), layer.shape[3] ** -0.5, near[3], own, grad.dtype
        for into, gradient in zip(total, dense.captured_gradients(*near[:3], *how), strict=True):
            into += gradient
    return total


def step(function, given, grad):
    out = function(*given)
    return [out.detach(), *torch.autograd.grad(out, given, grad)]


def errors(layer, function):
    """By name of what is compared: the error over that of stock precision."""
    length = layer.length or ACCURACY_LENGTH
    given, grad = leaves(layer, length)
    with collect() as report:
        found = step(function(length), given, grad)
    exact, stock = (by_dense(layer, length, given, grad, e) for e in (True, False))
    names = ["out", "dQ", "dK", "dV", *(f"learnt {i}" for i in range(len(given) - 3))]
    ratios = {n: float((f - e).norm() / (s - e).norm()) for n, f, e, s in zip(names, found, exact, stock, strict=True)}
    return ratios, report


def first_step(layer, length, name):
    """A function that has run once, and its report."""
    given, grad = leaves(layer, length)
    function = compiled(layer, length, name)
    with collect() as report:
        step(function, given, grad)
    return function, report


def times(layer, length, repeats):
    """Median milliseconds of a step by contender, those that fail left out; samples take turns."""
    given, grad = leaves(layer, length)
    torch._dynamo.reset()
    found = {name: tried(first_step, layer, length, name) for name in CONTENDERS}
    functions = {name: works[0] for name, works in found.items() if works}
    samples = {name: [] for name in functions}
    calls = 1
    for repeat in range(WARM_UP + repeats):
        for name, function in functions.items():
            taken, _ = on_device(lambda f=function: [step(f, given, grad) for _ in range(calls)])
            if repeat >= WARM_UP:
                samples[name].append(taken / calls)
        if repeat == WARM_UP - 1:
            calls = max(1, min(MOST_CALLS, round(LONGEST / max(taken, 1e-6))))
    return {name: statistics.median(values) for name, values in samples.items()}


def by_default(layer, length):
    """What becomes of the call without options."""
    found = []

    def backend(graph_module, inputs):
        found.extend(lower_calls(graph_module, inputs, Options(tile_lists=False)))
        return lambda *_: (torch.zeros(()),)

    torch._dynamo.reset()
    torch.compile(function_of(layer, length), backend=backend, dynamic=False)(*leaves(layer, length)[0])
    return ", ".join(f"kept: {call.reason.code.name}" if call.reason else "lowered" for call in found)


def row(name, length, repeats, off):
    """A line of the table; the name goes to `off` if a number is."""
    layer = LAYERS[name]
    length = layer.length or length
    torch._dynamo.reset()
    ratios, report = errors(layer, lambda n: compiled(layer, n, "numbers"))
    how = "; ".join("+".join(c.strategies) if c.reason is None else f"kept: {c.reason.code.name}" for c in report.calls)
    worst = max(ratios, key=ratios.get)
    print(name, {n: round(r, 2) for n, r in ratios.items()}, *report.kept, flush=True)
    if not ratios[worst] <= LIMIT:
        off.append(name)
    taken, default = times(layer, length, repeats), tried(by_default, layer, length)
    theirs, ours = (taken.get(contender, math.nan) for contender in CONTENDERS)
    line = f"{name:18} {how:34} {ratios[worst]:5.2f} ({worst:8})"
    return f"{line} {theirs:8.3f} / {ours:.3f} ms {theirs / ours:6.2f}x  {default or 'FAILED'}"


@measuring()
def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("layers", nargs="*")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("accuracy: no NVIDIA GPU here")
    off = []
    well = lines(given.layers or LAYERS, row, given.length, given.repeats, off)
    print("columns: layer; how with lower=always; error, in that of stock; Inductor's time / ours; default")
    print(f"beyond {LIMIT} times stock's error: {', '.join(off) or 'none'}")
    return int(bool(off) or not well)


if __name__ == "__main__":
    sys.exit(main())
