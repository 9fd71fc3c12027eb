"""Models of many attention layers, whose functions are equal or differ, for tests of what compiling them takes."""

import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile.bench.mods import causal, sliding, softcap

LENGTH, HEADS, DIM = 128, 4, 16
KINDS = ("soft cap", "window", "ALiBi")


class Attention(nn.Module):
    """Each layer has functions of its own, made anew, as models have them."""

    def __init__(self, kind, masks, dim, device, dtype):
        super().__init__()
        self.project = nn.Linear(HEADS * dim, 3 * HEADS * dim, device=device, dtype=dtype)
        self.slopes = nn.Buffer(torch.rand(HEADS, device=device))
        self.kind, self.masks = kind, masks

    def score_mod(self):
        if self.kind == "soft cap":
            return softcap(20.0)
        return (lambda s, b, h, q, kv: s - self.slopes[h] * (q - kv)) if self.kind == "ALiBi" else None

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, HEADS, -1).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        mask = self.masks["window" if self.kind == "window" else "causal"]
        out = flex_attention(q, k, v, self.score_mod(), mask)
        return x + out.transpose(1, 2).reshape(batch, length, -1)


def model(kinds, length=LENGTH, dim=DIM, device="cpu", dtype=torch.bfloat16):
    """One layer for each kind."""
    mods = {"causal": causal, "window": sliding(length // 2)}
    masks = {name: create_block_mask(mod, None, None, length, length, device=device) for name, mod in mods.items()}
    return nn.Sequential(*(Attention(kind, masks, dim, device, dtype) for kind in kinds))


def inputs(length=LENGTH, dim=DIM, device="cpu", dtype=torch.bfloat16, batch=1):
    return torch.randn(batch, length, HEADS * dim, device=device, dtype=dtype)
