"""What share of a call's compile time certification takes: python3 -m tests.measure.certify_time [--shape B,H,Hkv,S,D].

Knows nothing of what is checked. Each mod's forward and backward are compiled in a process of their own, without
torch's compile caches, one process after the other. The first certification of a process loads the kernels that torch
computes with, and cuBLAS: what that takes is told beside, as that of another program, which is compiled before. Exit
code 1 if the share of a call is beyond the limit.
"""

import argparse
import sys
import time

import torch
import torch._inductor.config
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import cache_info
from cudnn_flex_compile.bench.mods import MASKS, MODS
from tests.measure.measuring_lock import in_turn

LIMIT = 0.15
NAMES = ("full", "causal", "sliding window", "soft cap + causal", "ALiBi + causal", "relative bias", "prefix-LM",
         "head scale", "padded lengths", "causal + padding, scattered", "relative table")  # fmt: skip


def inputs(batch, heads, kv_heads, length, dim):
    def draw(h):
        return torch.randn(batch, length, h, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    return [draw(h).requires_grad_() for h in (heads, kv_heads, kv_heads)]


def first(score, batch, head, query, key):
    return 0.5 * score


def compiled(score_mod, block_mask):
    """Seconds that a call's first forward and backward take, and what cache_info then says, as a function of inputs."""

    def call(q, k, v):
        return flex_attention(q, k, v, score_mod, block_mask, enable_gqa=q.shape[1] > k.shape[1])

    function = torch.compile(call, backend="cudnn_flex", options={"lower": "always", "certify": "always"})

    def run(query, key, value):
        grad = torch.randn_like(query)
        torch.cuda.synchronize()
        start = time.perf_counter()
        function(query, key, value).backward(grad)
        torch.cuda.synchronize()
        return time.perf_counter() - start, cache_info()

    return run


def work(part):
    """What is measured of a mod, a generator for in_turn: its share, and a line of text."""
    name, shape = part
    torch._inductor.config.force_disable_caches = True
    batch, heads, _, length, _ = shape
    score_mod, mask_mod = {**MODS, **MASKS}[name](heads, length, "cuda")
    entries = batch if name in MASKS and "padd" in name else None
    block_mask = create_block_mask(mask_mod, entries, None, length, length, device="cuda") if mask_mod else None
    tensors = inputs(*shape)
    yield
    other, before = compiled(first, None)(*tensors)
    seconds, after = compiled(score_mod, block_mask)(*tensors)
    took, plans = after.certify_seconds - before.certify_seconds, after.certifications - before.certifications
    share = took / seconds
    told = f"{seconds:6.2f} s, certification {took:6.3f} s of {plans} plans: {share:5.1%}"
    yield share, f"{name:30} {told}; first of the process {before.certify_seconds:5.3f} of {other:5.2f} s"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="2,16,16,4096,128")
    shape = [int(n) for n in parser.parse_args().shape.split(",")]
    shares = []
    for found in in_turn(work, [(name, shape) for name in NAMES]):
        share, line = (None, found) if isinstance(found, str) else found
        shares.append(share)
        print(line, flush=True)
    worst = max((share for share in shares if share is not None), default=0.0)
    print(f"at most {worst:.1%}, limit {LIMIT:.0%}")
    return int(worst > LIMIT or None in shares)


if __name__ == "__main__":
    sys.exit(main())
