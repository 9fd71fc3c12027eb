"""Biases that models learn: their tensors, what they add to the score, and under which mask.

Knows nothing of what is tested or timed. A form is `make(batch, heads, length) -> (tensors, score_mod of these, mask)`;
the tensors are float32, as parameters are under autocast, where the name does not say otherwise.
"""

import math

import torch

from cudnn_flex_compile.bench.mods import causal, sliding

BUCKETS, LARGEST = 32, 128


def drawn(*shape, dtype=torch.float32, scale=1.0):
    generator = torch.Generator("cuda").manual_seed(len(shape))
    return (torch.randn(shape, device="cuda", generator=generator) * scale).to(dtype).requires_grad_()


def bucket(distance):
    """T5's, of both directions: half of the buckets for small distances, the others by logarithm."""
    half, exact = BUCKETS // 2, BUCKETS // 4
    size = distance.abs()
    large = exact + (torch.log(size.float().clamp(min=1) / exact) / math.log(LARGEST / exact) * (half - exact)).int()
    return torch.where(distance > 0, half, 0) + torch.where(size < exact, size, large.clamp(max=half - 1))


def t5(batch, heads, length, dtype=torch.float32, mask=None):
    buckets, table = bucket(torch.arange(-length, length, device="cuda")), drawn(BUCKETS, heads, dtype=dtype)
    return [table], lambda t: lambda s, b, h, q, kv: s + t[buckets[kv - q + length], h], mask


def relative(batch, heads, length, mask=causal):
    table = drawn(heads, 2 * length)
    return [table], lambda t: lambda s, b, h, q, kv: s + t[h, q - kv + length], mask


def swin(batch, heads, length):
    """One bias for all windows, by the distances in two dimensions of a square window."""
    side = math.isqrt(length)
    x, y = torch.arange(length, device="cuda") // side, torch.arange(length, device="cuda") % side
    index = (x[:, None] - x + side) * 2 * side + y[:, None] - y + side
    return [drawn(4 * side * side + 2 * side, heads)], lambda t: lambda s, b, h, q, kv: s + t[index[q, kv], h], None


def parameter(batch, heads, length, dtype=torch.float32, mask=None):
    return [drawn(heads, length, length, dtype=dtype)], lambda t: lambda s, b, h, q, kv: s + t[h, q, kv], mask


def of_each_entry(batch, heads, length):
    return [drawn(batch, heads, length, length)], lambda t: lambda s, b, h, q, kv: s + t[b, h, q, kv], causal


def of_all(batch, heads, length):
    return [drawn(1, 1, length, length)], lambda t: lambda s, b, h, q, kv: s + t[0, 0, q, kv], None


def graphormer(batch, heads, length):
    place = torch.arange(length, device="cuda")
    paths = (place[:, None] * 7 + place * 3 + torch.arange(batch, device="cuda")[:, None, None]) % 20
    return [drawn(20, heads)], lambda t: lambda s, b, h, q, kv: s + t[paths[b, q, kv], h], None


def slopes(batch, heads, length):
    return [drawn(heads, scale=0.02)], lambda t: lambda s, b, h, q, kv: s + t[h] * (kv - q), causal


def columns(batch, heads, length):
    return [drawn(length)], lambda t: lambda s, b, h, q, kv: s + t[kv], causal


def rows(batch, heads, length):
    return [drawn(length)], lambda t: lambda s, b, h, q, kv: s + t[q], None


def several(batch, heads, length):
    def make(scale, bias):
        return lambda s, b, h, q, kv: s + bias[h, q, kv] * 0.5 + scale[h] * (kv - q)

    return [drawn(heads, scale=0.02), drawn(heads, length, length)], make, causal


FORMS = {
    "T5": t5,
    "T5, causal": lambda *n: t5(*n, mask=causal),
    "T5, bfloat16": lambda *n: t5(*n, dtype=torch.bfloat16),
    "relative table, causal": relative,
    "relative table, window": lambda *n: relative(*n, mask=sliding(100)),
    "relative table, symmetric window": lambda *n: relative(*n, mask=lambda b, h, q, kv: (q - kv).abs() <= 100),
    "relative table, rows without a key": lambda *n: relative(*n, mask=lambda b, h, q, kv: q >= kv + 200),
    "[H, S, S]": parameter,
    "[H, S, S], causal": lambda *n: parameter(*n, mask=causal),
    "[H, S, S], bfloat16": lambda *n: parameter(*n, dtype=torch.bfloat16),
    "[B, H, S, S]": of_each_entry,
    "[1, 1, S, S]": of_all,
    "Graphormer": graphormer,
    "Swin": swin,
    "slopes": slopes,
    "columns": columns,
    "rows": rows,
    "several": several,
}
