"""Ops on integers that cuDNN computes in float32, on a GPU: scoremod/integers.py has the forms that it gets right.

The values are such that one wrong quotient or remainder shows: dense attention in float64 says how far off stock is.
"""

import pytest
import torch

from tests.gpu.test_numerics import check

DIVISORS = (3, 7, 41, 47, 55, 97, 128, 1000)  # 1 / 41 and others are rounded down, so that 41 times it is less than 1
FORMS = {
    "remainders of distances": lambda d: (None, lambda b, h, q, kv: (q - kv) % d < d // 2 + 1),
    "remainders of sums": lambda d: (None, lambda b, h, q, kv: (q + kv) % d != 1),
    "quotients of distances": lambda d: (lambda s, b, h, q, kv: s + (q - kv) // d % 2 * 4.0, None),
    "quotients of distances the other way": lambda d: (lambda s, b, h, q, kv: s + (kv - q) // d % 2 * 4.0, None),
    "quotients of sums": lambda d: (lambda s, b, h, q, kv: s + (q + kv) // d % 2 * 4.0, None),
    "quotients of rows and columns": lambda d: (lambda s, b, h, q, kv: s + (q // d - kv // d) * 0.125, None),
    "blocks under a causal mask": lambda d: (
        lambda s, b, h, q, kv: s + (q // d - kv // d).abs() % 3 * 1.0, lambda b, h, q, kv: q >= kv),
}  # fmt: skip


def distances(far):
    """Adds the distances of row and column to a far integer, less what they are: zero, unless one is rounded."""

    def score_mod(s, b, h, q, kv):
        return s + ((q - far).abs() + (kv - far).abs() + q + kv - far - far) * 1.0

    return score_mod


@pytest.mark.parametrize("far", [2**25 + 1, 2**27 + 3])
def test_distances_to_far_integers(far):
    check(lambda heads, length, device: (distances(far), None), None, 64, 1000, torch.bfloat16, 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divisor", DIVISORS)
def test_within_twice_stock_error(divisor, form):
    check(lambda heads, length, device: FORMS[form](divisor), None, 64, 1000, torch.bfloat16, 1)
