"""Whole attention layers of known models: numbers against float64, and the time of a step beside Inductor's.

    python3 -m tests.gpu.accuracy [--length 4096] [--repeats 12] [layer ...]

Each layer is attention as the model has it, with all that its gradients reach. At a length of 1024 the output and every
gradient are compared with float64; an error is given as a multiple of that of stock precision (flex_attention's eager
rounding), and none may be beyond 2. At --length, forward and backward are timed: Inductor's time / ours, medians of
samples that take turns, with everything lowered (lower="always") and as called by default. Exit code 1 if a number is
off, or a layer fails.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile.bench.measure import on_device
from cudnn_flex_compile.bench.mods import causal, sliding, softcap
from cudnn_flex_compile.report import collect
from tests import dense
from tests.gpu.unattended import lines

ACCURACY_LENGTH, LIMIT = 1024, 2.0
WARM_UP, LONGEST, MOST_CALLS = 4, 20, 10  # samples; milliseconds of a sample, and its calls at most
CONTENDERS = {"inductor": None, "always": {"lower": "always", "cache": False}, "default": {"cache": False}}


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
    "T5": Layer((2, 12, 12, 64), t5, lambda heads: ((heads, BUCKETS),)),
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


def compiled(layer, length, contender):
    """The layer as a function of its leaves."""
    mods = layer.mods(length)
    _, mask_mod = mods([torch.zeros(shape, device="cuda") for shape in layer.learnt(layer.shape[1])])
    mask = create_block_mask(mask_mod, None, None, length, length, device="cuda") if mask_mod else None
    how = {"backend": "inductor"} if contender == "inductor" else {"backend": "cudnn_flex"}
    if CONTENDERS[contender] is not None:
        how["options"] = CONTENDERS[contender]
    return torch.compile(functools.partial(attend, layer, mods, mask), dynamic=False, **how)


def by_dense(layer, length, given, grad, exact):
    """Output and gradients, one batch entry at a time: pairs take memory."""
    mods = layer.mods(length)
    learnt = [dense.leaf(t, exact) for t in given[3:]]
    rows = []
    for entry in range(grad.shape[0]):
        copies = [dense.leaf(t[entry : entry + 1], exact) for t in given[:3]]
        out, lse = dense.attention(*copies, *mods(learnt), layer.shape[3] ** -0.5, exact)
        out = out if layer.after is None else layer.after(out, lse, learnt)
        out.backward(grad[entry : entry + 1].to(out.dtype))
        rows.append((out.detach(), *(t.grad for t in copies)))
    return [torch.cat(parts) for parts in zip(*rows, strict=True)] + [t.grad for t in learnt]


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


def times(layer, length, repeats):
    """Median milliseconds of a step by contender; samples take turns."""
    length = layer.length or length
    given, grad = leaves(layer, length)
    torch._dynamo.reset()
    functions = {name: compiled(layer, length, name) for name in CONTENDERS}
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


def row(name, length, repeats, off):
    """A line of the table; the name goes to `off` if a number is."""
    layer = LAYERS[name]
    torch._dynamo.reset()
    ratios, report = errors(layer, lambda n: compiled(layer, n, "always"))
    how = "; ".join("+".join(c.strategies) if c.reason is None else f"kept: {c.reason.code.name}" for c in report.calls)
    worst = max(ratios, key=ratios.get)
    print(name, {n: round(r, 2) for n, r in ratios.items()}, *report.kept, flush=True)
    taken = times(layer, length, repeats)
    always, default = (taken["inductor"] / taken[c] for c in ("always", "default"))
    line = f"{name:18} {how:34} {ratios[worst]:5.2f} ({worst:8})  {taken['inductor']:7.3f} ms"
    if not ratios[worst] <= LIMIT:
        off.append(name)
    return f"{line} {always:6.2f}x {default:6.2f}x"


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
    print("columns: layer; how with lower=always; error, in that of stock; Inductor's time; ratios: always, default")
    print(f"beyond {LIMIT} times stock's error: {', '.join(off) or 'none'}")
    return int(bool(off) or not well)


if __name__ == "__main__":
    sys.exit(main())
