# pyright: reportMissingParameterType=false, reportUntypedFunctionDecorator=false
"""The score_mods and masks that the tables of this project are about, as users write them.

MODS are the ten of every table, MASKS are more. Each is a function of (heads, kv length, device) that gives
(score_mod, mask_mod), either of them None.
"""

import torch


def softcap(cap):
    """cap * tanh(score / cap)."""

    def score_mod(score, b, h, q, kv):
        return torch.tanh(score / cap) * cap

    return score_mod


def causal(b, h, q, kv):
    """Keys at or before the query."""
    return q >= kv


def sliding(window):
    """Causal, at most `window` keys back."""

    def mask_mod(b, h, q, kv):
        return (q >= kv) & (q - kv <= window)

    return mask_mod


def alibi(heads, device):
    """A penalty by distance, with a slope for each head."""
    slopes = torch.exp2(-8.0 * torch.arange(1, heads + 1, device=device) / heads)

    def score_mod(score, b, h, q, kv):
        return score - slopes[h] * (q - kv)

    return score_mod


def relative(score, b, h, q, kv):
    """The distance, as a bias."""
    return score + (q - kv) * 0.01


def prefix_lm(prefix):
    """Causal, and all of the first `prefix` keys."""

    def mask_mod(b, h, q, kv):
        return (q >= kv) | (kv < prefix)

    return mask_mod


def symmetric(window):
    """Keys at most `window` away, before or after."""

    def mask_mod(b, h, q, kv):
        return torch.abs(q - kv) <= window

    return mask_mod


def sinks(count, window):
    """The first `count` keys, and a causal window."""

    def mask_mod(b, h, q, kv):
        return (q >= kv) & ((q - kv <= window) | (kv < count))

    return mask_mod


def shifted(keys):
    """Causal, and `keys` keys more."""

    def mask_mod(b, h, q, kv):
        return q + keys >= kv

    return mask_mod


def dilated(window, step):
    """Every `step`-th key of a causal window."""

    def mask_mod(b, h, q, kv):
        return (q >= kv) & (q - kv <= window) & ((q - kv) % step == 0)

    return mask_mod


def block_causal(size):
    """Causal by blocks of `size`."""

    def mask_mod(b, h, q, kv):
        return q // size >= kv // size

    return mask_mod


def padded(lengths):
    """Keys below lengths[b]; lengths [B]."""

    def mask_mod(b, h, q, kv):
        return kv < lengths[b]

    return mask_mod


def causal_padding(padding):
    """Causal, without padded keys, as transformers writes it."""

    def mask_mod(b, h, q, kv):
        visible = q.new_ones((), dtype=torch.bool)
        visible = visible & (kv <= q)
        return visible & padding[b, kv]

    return mask_mod


def documents(ids):
    """Causal within documents; ids [S]."""

    def mask_mod(b, h, q, kv):
        return (ids[q] == ids[kv]) & (q >= kv)

    return mask_mod


def frames(ends):
    """Keys before the end of the query's chunk of frames, and the query itself; ends [S]."""

    def mask_mod(b, h, q, kv):
        return (kv < ends[q]) | (q == kv)

    return mask_mod


def last_keys(first):
    """Keys from `first` on, for all queries: a window that decoding has."""

    def mask_mod(b, h, q, kv):
        return kv >= first

    return mask_mod


def relative_table(table, offset):
    """A bias by head and distance; table [H, distances], the distance 0 at `offset`."""

    def score_mod(score, b, h, q, kv):
        return score + table[h, q - kv + offset]

    return score_mod


def added(bias):
    """A bias [H, Sq, Skv]."""

    def score_mod(score, b, h, q, kv):
        return score + bias[h, q, kv]

    return score_mod


def head_scale(heads, device):
    """The score times a number for each head."""
    scales = torch.linspace(0.5, 1.5, heads, device=device)

    def score_mod(score, b, h, q, kv):
        return score * scales[h]

    return score_mod


def soft_cap_window_1024(heads, length, device):
    return softcap(50.0), sliding(1024)


MODS = {
    "full": lambda heads, length, device: (None, None),
    "causal": lambda heads, length, device: (None, causal),
    "sliding window": lambda heads, length, device: (None, sliding(length // 4)),
    "soft cap": lambda heads, length, device: (softcap(20.0), None),
    "soft cap + causal": lambda heads, length, device: (softcap(20.0), causal),
    "soft cap + window": lambda heads, length, device: (softcap(50.0), sliding(length // 4)),
    "ALiBi + causal": lambda heads, length, device: (alibi(heads, device), causal),
    "relative bias": lambda heads, length, device: (relative, None),
    "prefix-LM": lambda heads, length, device: (None, prefix_lm(length // 8)),
    "head scale": lambda heads, length, device: (head_scale(heads, device), None),
}


ENTRIES = 8  # batch entries of the masks that differ by batch entry


def _lengths(length, device):
    """The lengths of the batch entries: 7/8, 5/8, 7/8, ... of the keys."""
    return torch.tensor([length - length // 8, length - 3 * length // 8] * (ENTRIES // 2), device=device)


def _padding(kind, length, device):
    valid = torch.arange(length, device=device) < _lengths(length, device)[:, None]
    generator = torch.Generator(device).manual_seed(0)
    scattered = torch.rand(ENTRIES, length, generator=generator, device=device) > 0.3
    return {"right": valid, "left": valid.flip(1), "scattered": scattered}[kind]


def _ids(length, device):
    return torch.arange(length, device=device) * 8 // length


def _ends(length, device):
    """The ends of seven chunks of frames."""
    chunk = -(-length // 7)
    return ((torch.arange(length, device=device) // chunk + 1) * chunk).clamp(max=length)


def _table(heads, length, device):
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(heads, 2 * length, generator=generator, device=device)


def _bias(heads, length, device):
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(heads, length, length, generator=generator, device=device).bfloat16()


# More masks and captured tensors, of the same signature.
MASKS = {
    "sink tokens + window": lambda heads, length, device: (None, sinks(10, length // 4)),
    "sink tokens + small window": lambda heads, length, device: (None, sinks(10, length // 16)),
    "symmetric window": lambda heads, length, device: (None, symmetric(length // 16)),
    "shifted causal": lambda heads, length, device: (None, shifted(length // 8)),
    "strict causal": lambda heads, length, device: (None, shifted(-1)),
    "block causal": lambda heads, length, device: (None, block_causal(64)),
    "dilated window": lambda heads, length, device: (None, dilated(length // 4, 2)),
    "padded lengths": lambda heads, length, device: (None, padded(_lengths(length, device))),
    "causal + padding, right": lambda heads, length, device: (None, causal_padding(_padding("right", length, device))),
    "causal + padding, left": lambda heads, length, device: (None, causal_padding(_padding("left", length, device))),
    "causal + padding, scattered": lambda heads, length, device: (
        None, causal_padding(_padding("scattered", length, device))),
    "documents": lambda heads, length, device: (None, documents(_ids(length, device))),
    "relative table": lambda heads, length, device: (relative_table(_table(heads, length, device), length), None),
    "bias tensor": lambda heads, length, device: (added(_bias(heads, length, device)), None),
}  # fmt: skip
BY_BATCH = {name for name in MASKS if "padd" in name}
ALL = {**MODS, **MASKS, "soft cap + window 1024": soft_cap_window_1024}
# Masks that only the regret of choices is measured on; cuDNN is not asked about them (tests/deviceless/matrix.py).
KNOWN = {
    **ALL, "frames": lambda heads, length, device: (None, frames(_ends(length, device))),
    "last keys": lambda heads, length, device: (None, last_keys(length - length // 4)),
}  # fmt: skip
# The cases that the first table of docs/benchmarks.md is about, at its eight shapes B, H, Hkv, S, D.
FIVE = ("full", "causal", "soft cap + causal", "soft cap + window 1024", "ALiBi + causal")
EIGHT = (
    "8,16,16,1024,128", "4,32,8,2048,128", "2,16,16,4096,64", "2,32,8,8192,128", "1,16,16,16384,128",
    "2,8,4,4096,256", "16,12,12,512,64", "1,32,8,32768,128",
)  # fmt: skip
