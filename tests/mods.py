"""The ten score_mods and masks that every table of this project is about, as users write them.

Each is a function of (heads, kv length, device) that gives (score_mod, mask_mod), either of them None.
"""

import torch


def softcap(cap):
    def score_mod(score, b, h, q, kv):
        return torch.tanh(score / cap) * cap

    return score_mod


def causal(b, h, q, kv):
    return q >= kv


def sliding(window):
    def mask_mod(b, h, q, kv):
        return (q >= kv) & (q - kv <= window)

    return mask_mod


def alibi(heads, device):
    slopes = torch.exp2(-8.0 * torch.arange(1, heads + 1, device=device) / heads)

    def score_mod(score, b, h, q, kv):
        return score - slopes[h] * (q - kv)

    return score_mod


def relative(score, b, h, q, kv):
    return score + (q - kv) * 0.01


def prefix_lm(prefix):
    def mask_mod(b, h, q, kv):
        return (q >= kv) | (kv < prefix)

    return mask_mod


def head_scale(heads, device):
    scales = torch.linspace(0.5, 1.5, heads, device=device)

    def score_mod(score, b, h, q, kv):
        return score * scales[h]

    return score_mod


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
