# pyright: reportMissingParameterType=false, reportMissingImports=false, reportArgumentType=false, reportUntypedFunctionDecorator=false
"""The Triton kernel of folded_output.py: one block of query rows of one head.

It has a file of its own, because only CUDA builds of torch have Triton.
"""

import triton
import triton.language as tl


@triton.jit
def fold_rows(
    out, grad, grad_lse, folded, folded_grad, heads, rows, dim,
    out_b, out_h, out_r, grad_b, grad_h, grad_r, lse_b, lse_h, lse_r,
    folded_b, folded_h, folded_r, fgrad_b, fgrad_h, fgrad_r,
    ROWS: tl.constexpr, DIM: tl.constexpr, TINY: tl.constexpr, SECOND: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.arange(0, DIM)
    inside = r < rows
    both = inside[:, None] & (d < dim)[None, :]
    o = tl.load(out + b * out_b + h * out_h + r[:, None] * out_r + d[None, :], mask=both, other=0.0).to(tl.float32)
    do = tl.load(grad + b * grad_b + h * grad_h + r[:, None] * grad_r + d[None, :], mask=both, other=0.0).to(tl.float32)
    dlse = tl.load(grad_lse + b * lse_b + h * lse_h + r * lse_r, mask=inside, other=0.0)
    size = tl.max(tl.abs(do), axis=1)
    small = size < TINY
    size = tl.maximum(size, TINY)
    tiny = tl.where(d == 0, 1.0, tl.where(d == 1, SECOND, 0.0))
    unit = tl.where(small[:, None], tiny[None, :], do / size[:, None])
    share = dlse / (size * tl.sum(unit * unit, axis=1))
    moved = small & (dlse != 0.0)
    given = tl.where(moved[:, None], unit * TINY, do)
    rounded = (o - unit * share[:, None]).to(folded.dtype.element_ty).to(tl.float32)
    left = tl.sum(given * rounded - do * o, axis=1) + dlse
    weight = tl.where(tl.abs(given) >= size[:, None] * LEAST, tl.abs(given * rounded), float("inf"))
    chosen = (d[None, :] == tl.argmin(weight, axis=1)[:, None]) & (given != 0.0)
    result = tl.where(chosen, rounded - left[:, None] / given, rounded)
    folded_at = folded + b * folded_b + h * folded_h + r[:, None] * folded_r + d[None, :]
    fgrad_at = folded_grad + b * fgrad_b + h * fgrad_h + r[:, None] * fgrad_r + d[None, :]
    tl.store(folded_at, result.to(folded.dtype.element_ty), mask=both)
    tl.store(fgrad_at, given.to(folded_grad.dtype.element_ty), mask=both)
