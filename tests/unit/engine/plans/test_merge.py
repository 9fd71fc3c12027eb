"""Merging attention over disjoint keys, on the host.

Knows nothing of plans.
"""

import math

import pytest
import torch

from cudnn_flex_compile.engine.plans.merge import merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_rows(dtype):
    """Rows with keys on both sides, on either and on neither; log-sum-exps far apart, and too low for exp."""
    inf = math.inf
    mine = torch.tensor([0.5, -inf, 2.0, -inf, 80.0, -2000.0, -2000.0, 1e4])
    other = torch.tensor([1.5, 1.0, -inf, -inf, -80.0, -2001.0, -inf, 1e4])
    out, part = torch.randn(2, 1, 1, 8, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    out[..., (mine == -inf), :] = 0
    part[..., (other == -inf), :] = 0
    lse, part_lse = (x.view(1, 1, 8, 1).clone() for x in (mine, other))
    total = torch.logaddexp(mine.double(), other.double())
    shares = [torch.where(total == -inf, 0.0, torch.exp(x.double() - total)).view(1, 1, 8, 1) for x in (mine, other)]
    expected = shares[0] * out.double() + shares[1] * part.double()
    merge(out, lse, part, part_lse)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double().flatten(), total, rtol=1e-6, atol=1e-6)
    assert (lse.flatten() == -inf).tolist() == [False, False, False, True] + [False] * 4


def test_merging_into_views():
    whole = torch.zeros(2, 9, 3, 4).transpose(1, 2)
    lse = torch.full((2, 3, 9, 1), -math.inf)
    part, part_lse = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 1)
    merge(whole[:, :, 2:6], lse[:, :, 2:6], part, part_lse)
    covered = torch.zeros(9, dtype=torch.bool).index_fill(0, torch.arange(2, 6), True)
    assert torch.equal(whole, covered.float().view(1, 1, 9, 1).expand_as(whole))
    assert torch.equal(lse == 0, covered.view(1, 1, 9, 1).expand_as(lse))
