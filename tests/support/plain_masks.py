"""Masks whose rows show few runs of keys, as plain calls have them, and how such a call is checked.

Knows nothing of devices, nor of which way a call takes. Each mask is made for a batch, a length and a device.
"""

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.support import dense


def full(batch, length, device):
    return None


def causal(batch, length, device):
    return lambda b, h, q, kv: q >= kv


def window(size):
    return lambda batch, length, device: lambda b, h, q, kv: (q >= kv) & (q - kv < size)


def sliding(batch, length, device):
    """Keys on either side."""
    return lambda b, h, q, kv: (q - kv <= 40) & (kv - q <= 24)


def prefix(batch, length, device):
    return lambda b, h, q, kv: (q >= kv) | (kv < length // 5)


def sinks(batch, length, device):
    return lambda b, h, q, kv: (q >= kv) & ((q - kv < 48) | (kv < 4))


def frames(batch, length, device):
    return lambda b, h, q, kv: q // 40 >= kv // 40


def lengths_of(batch, length, device):
    return torch.tensor([length - (length * 3 // 8) * i // max(batch - 1, 1) for i in range(batch)], device=device)


def right_padding(batch, length, device):
    ends = lengths_of(batch, length, device)
    return lambda b, h, q, kv: (q >= kv) & (kv < ends[b])


def left_padding(batch, length, device):
    starts = length - lengths_of(batch, length, device)
    return lambda b, h, q, kv: (q >= kv) & (kv >= starts[b])


def scattered_padding(batch, length, device):
    """One hole in each row of the batch."""
    here = torch.ones(batch, length, dtype=torch.bool, device=device)
    for i in range(batch):
        here[i, length // 3 : length // 3 + 20 * i + 5] = False
    return lambda b, h, q, kv: here[b, kv] & (q >= kv)


def nothing_for_some(batch, length, device):
    """Rows that see nothing, and keys that no row sees."""
    return lambda b, h, q, kv: (q >= 70) & (kv >= 33) & (q >= kv)


MASKS = {
    "full": full, "causal": causal, "window": window(50), "sliding": sliding, "prefix-LM": prefix,
    "sinks + window": sinks, "frames": frames, "right padding": right_padding, "left padding": left_padding,
    "scattered padding": scattered_padding, "rows that see nothing": nothing_for_some,
}  # fmt: skip


def inputs(batch, length, heads, kv_heads, dim, dtype, device, value_dim=None, seed=0):
    """Query, key and value, which require grad, and a gradient of the output."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(count, channels):
        shape = batch, length, count, channels
        return torch.randn(shape, device=device, dtype=dtype, generator=generator).transpose(1, 2)

    sizes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim or dim))
    return [draw(*size).requires_grad_() for size in sizes], draw(heads, value_dim or dim)


def block_mask(mask_mod, batch, length, device, block_size=128):
    return None if mask_mod is None else create_block_mask(mask_mod, batch, None, length, length, device, block_size)


def attend(q, k, v, mask):
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def assert_right(out, qkv, grad, mask_mod):
    """The output and all gradients of it are right."""
    assert_right_numbers((out.detach(), *torch.autograd.grad(out, qkv, grad)), qkv, grad, mask_mod)


def assert_right_numbers(found, qkv, grad, mask_mod):
    """Within twice what stock is off by, in the output and all gradients. Where a row sees one key, its dQ is a
    difference of equal numbers, as large as dV, of which float32 leaves a rest.
    """
    scale = qkv[0].shape[-1] ** -0.5
    results = (dense.with_gradients(*qkv, None, mask_mod, scale, grad, exact) for exact in (True, False))
    (out, _, *gradients), (stock, _, *stock_gradients) = results
    names, rest = ("out", "dQ", "dK", "dV"), 1e-5 * gradients[2].norm()
    for name, mine, exact, theirs in zip(names, found, (out, *gradients), (stock, *stock_gradients), strict=True):
        assert mine.isfinite().all(), name
        error, stock = ((t.double() - exact).norm() for t in (mine, theirs))
        allowed = 2 * stock + 1e-3 * exact.norm() + rest
        assert error <= allowed, f"{name} is off by {error:.3g}, {allowed:.3g} are allowed"
