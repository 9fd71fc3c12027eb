"""Compiles and runs many calls, forward and backward, and prints as JSON what was built, restored and found.

    CUDNN_FLEX_CACHE_DIR=... python3 -m tests.measure.stored_calls [--lengths 320] [--die-at N] [--start N]

Each result is compared with float64 here. With --die-at, the process kills itself at the n-th write into the cache.
"""

import argparse
import hashlib
import json
import math
import os
import signal
import time

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import cache_info, collect
from cudnn_flex_compile.bench.mods import BY_BATCH, MASKS, MODS, sliding, softcap
from tests.support import dense

OPTIONS = {"inner_backend": "aot_eager", "lower": "always"}


ALL = {**MODS, **MASKS}
SCALARS = "scalars"  # numbers that become symbolic once they change
CALLS = (*ALL, SCALARS)


def draw(heads, length):
    return torch.randn(2, length, heads, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()


def run(name, length):
    """The digest of the last output, after all results were compared with float64."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    qkv = draw(4, length), draw(2, length), draw(2, length)
    if name == SCALARS:
        return run_scalars(qkv, length)
    score_mod, mask_mod = ALL[name](4, length, "cuda")
    entries = 2 if name in BY_BATCH else None
    mask = create_block_mask(mask_mod, entries, None, length, length, device="cuda") if mask_mod else None

    def call(q, k, v):
        return flex_attention(q, k, v, score_mod, mask, enable_gqa=True)

    return checked(torch.compile(call, backend="cudnn_flex", options=OPTIONS), qkv, score_mod, mask_mod)


def run_scalars(qkv, length):
    """An integer that changes, and then a float, without gradients: where they are recorded, torch 2.11's Dynamo breaks
    the graph at a float that changes, whatever the backend.
    """

    def call(q, k, v, window, cap):
        def score_mod(score, b, h, qi, ki):
            return torch.where((qi >= ki) & (qi - ki <= window), torch.tanh(score / cap) * cap, -math.inf)

        return flex_attention(q, k, v, score_mod, enable_gqa=True)

    function = torch.compile(call, backend="cudnn_flex", options=OPTIONS)
    for window in (16, length // 7, length // 3):
        checked(lambda *t, w=window: function(*t, w, 2.0), qkv, softcap(2.0), sliding(window))
    detached = [t.detach() for t in qkv]
    for cap in (2.0, 3.0, 5.0):
        digest = checked(lambda *t, c=cap: function(*t, 16, c), detached, softcap(cap), sliding(16))
    return digest


def checked(function, qkv, score_mod, mask_mod):
    out = function(*qkv)
    grad = torch.randn_like(out)
    found = (out.detach(), None, *(torch.autograd.grad(out, qkv, grad) if out.requires_grad else ()))
    exact, stock = (dense.with_gradients(*qkv, score_mod, mask_mod, 0.125, grad, exact=e) for e in (True, False))
    for f, e, s in zip(found, exact, stock, strict=False):
        assert f is None or (f - e).norm() <= 2 * (s - e).norm() + 1e-6
    return hashlib.sha256(out.detach().contiguous().view(torch.int16).cpu().numpy().tobytes()).hexdigest()[:16]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="*", default=[320])
    parser.add_argument("--die-at", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    given = parser.parse_args()
    replace, writes = os.replace, []

    def dying(source, target):
        if str(target).endswith(".plan"):
            writes.append(target)
            if len(writes) == given.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = dying
    calls = [(name, length) for length in given.lengths for name in CALLS]
    calls = calls[given.start :] + calls[: given.start]
    begun = time.perf_counter()
    with collect() as report:
        outputs = {f"{name}, {length}": run(name, length) for name, length in calls}
    seconds = {**report.seconds, "all": time.perf_counter() - begun}
    kept = {c.source: str(c.reason) for c in report.kept}
    print(json.dumps({"outputs": outputs, "kept": kept, "seconds": seconds, **cache_info()._asdict()}))


if __name__ == "__main__":
    main()
