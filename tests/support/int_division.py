"""// and % of integers as cuDNN computes them: in float32, toward zero.

Read in the kernels that cuDNN 9.19 and 9.28 compile for SM80 and SM90: x % d is fmod, and x // d is x times an
approximate 1 / d. Absolute values, minima and maxima are those of float32 (dialect.py); sums, products, comparisons and
selects of integers are exact.
"""

import math

import torch


def quotient(a: torch.Tensor, b: torch.Tensor, toward: float = 0.0) -> torch.Tensor:
    """1 / b may be off by one unit in the last place, but for powers of two: it is the next float32 `toward` here."""
    inverse = 1 / b.float()
    exact = torch.frexp(inverse)[0].abs() == 0.5
    return (a.float() * torch.where(exact, inverse, inverse.nextafter(torch.tensor(toward)))).trunc().int()


def greater_quotient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return quotient(a, b, math.inf)


def remainder(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.fmod(a.float(), b.float()).int()
