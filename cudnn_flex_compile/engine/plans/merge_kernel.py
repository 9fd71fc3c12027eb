# pyright: reportMissingParameterType=false, reportMissingImports=false, reportArgumentType=false, reportUntypedFunctionDecorator=false
"""The Triton kernel of merge.py: one block of query rows of one head.

It has a file of its own, because only CUDA builds of torch have Triton.
"""

import triton
import triton.language as tl


@triton.jit
def merge_rows(
    out, lse, part, part_lse, heads, rows, dim,
    out_b, out_h, out_r, lse_b, lse_h, lse_r, part_b, part_h, part_r, plse_b, plse_h, plse_r,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.arange(0, DIM)
    inside = r < rows
    both = inside[:, None] & (d < dim)[None, :]
    lse_at = lse + b * lse_b + h * lse_h + r * lse_r
    out_at = out + b * out_b + h * out_h + r[:, None] * out_r + d[None, :]
    part_at = part + b * part_b + h * part_h + r[:, None] * part_r + d[None, :]
    mine = tl.load(lse_at, mask=inside, other=0.0)
    other = tl.load(part_lse + b * plse_b + h * plse_h + r * plse_r, mask=inside, other=0.0)
    largest = tl.maximum(mine, other)
    safe = tl.where(largest == float("-inf"), 0.0, largest)
    left, right = tl.exp(mine - safe), tl.exp(other - safe)
    total = left + right
    share = tl.where(total == 0.0, 0.0, 1.0 / total)
    kept = tl.load(out_at, mask=both, other=0.0).to(tl.float32)
    added = tl.load(part_at, mask=both, other=0.0).to(tl.float32)
    result = kept * (left * share)[:, None] + added * (right * share)[:, None]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=both)
    tl.store(lse_at, safe + tl.log(total), mask=inside)
