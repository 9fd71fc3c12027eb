"""What share of a call's compile time certification takes: python3 -m tests.gpu.certify_time [--shape B,H,Hkv,S,D].

Knows nothing of what is checked. Forward and backward of each mod, compiled anew without torch's compile caches; the
first one is left out, which also warms up libraries. Exit code 1 if a share is beyond the limit.
"""

import argparse
import sys
import time

import torch
import torch._inductor.config
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import cache_clear, cache_info
from cudnn_flex_compile.bench.mods import MASKS, MODS
from tests.gpu.turns import measuring
from tests.gpu.unattended import lines

LIMIT = 0.15
WARM_UP = "full"
NAMES = ("full", "causal", "sliding window", "soft cap + causal", "ALiBi + causal", "relative bias", "prefix-LM",
         "head scale", "padded lengths", "causal + padding, scattered", "relative table")  # fmt: skip


def inputs(batch, heads, kv_heads, length, dim):
    def draw(h):
        return torch.randn(batch, length, h, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    return [draw(h).requires_grad_() for h in (heads, kv_heads, kv_heads)]


def seconds(name, shape):
    """Of compiling and running forward and backward once, of which certification, and of how many plans."""
    batch, heads, kv_heads, length, _ = shape
    score_mod, mask_mod = {**MODS, **MASKS}[name](heads, length, "cuda")
    entries = batch if name in MASKS and "padd" in name else None
    block_mask = create_block_mask(mask_mod, entries, None, length, length, device="cuda") if mask_mod else None
    query, key, value = inputs(*shape)
    grad = torch.randn_like(query)
    torch._dynamo.reset()
    cache_clear()

    def call(q, k, v):
        return flex_attention(q, k, v, score_mod, block_mask, enable_gqa=heads > kv_heads)

    compiled = torch.compile(call, backend="cudnn_flex", options={"lower": "always", "certify": "always"})
    torch.cuda.synchronize()
    start = time.perf_counter()
    compiled(query, key, value).backward(grad)
    torch.cuda.synchronize()
    info = cache_info()
    return time.perf_counter() - start, info.certify_seconds, info.certifications


def share(name, shape, shares):
    total, of_it, plans = seconds(name, shape)
    shares[name] = of_it / total
    return f"{name:30} {total:6.2f} s, certification {of_it:6.3f} s of {plans} plans: {of_it / total:5.1%}"


@measuring()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="2,16,16,4096,128")
    shape = [int(n) for n in parser.parse_args().shape.split(",")]
    torch._inductor.config.force_disable_caches = True
    shares = {}
    seconds(WARM_UP, shape)
    well = lines(NAMES, share, shape, shares)
    worst = max(shares.values(), default=0.0)
    print(f"at most {worst:.1%}, limit {LIMIT:.0%}")
    return int(worst > LIMIT or not well)


if __name__ == "__main__":
    sys.exit(main())
