"""Merges two attention results over disjoint keys by their log-sum-exps, in place.

box_plan.py merges its parts so: out = (out1 * e^lse1 + out2 * e^lse2) / (e^lse1 + e^lse2), as in Flash-Decoding
(https://crfm.stanford.edu/2023/10/12/flashdecoding.html) and ring attention; a row without keys has LSE -inf.
"""

import math

import torch
from torch import Tensor

ROWS = 32  # rows of one block of threads


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds `part` to `out`.

    Args:
        out, part: [B, H, R, D], any strides with a last one of 1.
        lse, part_lse: the natural log-sum-exps, [B, H, R, 1], float32, last two strides 1 and 1 or more.
    """
    if not out.is_cuda:
        _merge_on_host(out, lse, part, part_lse)
        return
    from cudnn_flex_compile.engine.plans.merge_kernel import merge_rows

    batch, heads, rows, dim = out.shape
    grid = (math.ceil(rows / ROWS), batch * heads)
    merge_rows[grid](  # pyright: ignore
        out, lse, part, part_lse, heads, rows, dim, *out.stride()[:3], *lse.stride()[:3], *part.stride()[:3],
        *part_lse.stride()[:3], ROWS=ROWS, DIM=1 << (dim - 1).bit_length(),
    )  # fmt: skip


def _merge_on_host(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    largest = torch.maximum(lse, part_lse)
    safe = torch.where(largest == -math.inf, 0.0, largest)
    mine, other = torch.exp(lse - safe), torch.exp(part_lse - safe)
    total = mine + other
    share = torch.where(total == 0, 0.0, 1 / total)
    out.copy_((mine * share) * out + (other * share) * part)
    lse.copy_(safe + torch.log(total))
