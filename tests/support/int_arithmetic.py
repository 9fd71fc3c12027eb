"""Ops on integers that cuDNN computes in float32.

Read in the kernels that cuDNN 9.19 and 9.28 compile for SM80 and SM90. Sums, products, comparisons and selects of
integers are exact there.
"""

import math
from collections.abc import Callable

import torch


def in_float32(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """An op on floats that does not round, such as a minimum, as it is computed on integers."""

    def compute(*values: torch.Tensor) -> torch.Tensor:
        if any(v.is_floating_point() for v in values):
            return function(*values)
        return function(*(v.float() for v in values)).int()

    return compute


def quotient(a: torch.Tensor, b: torch.Tensor, toward: float = 0.0) -> torch.Tensor:
    """x // d, toward zero, as x times 1 / d, which may be off by one unit in the last place, but for powers of
    two: it is the next float32 `toward` here.
    """
    inverse = 1 / b.float()
    exact = torch.frexp(inverse)[0].abs() == 0.5
    return (a.float() * torch.where(exact, inverse, inverse.nextafter(torch.tensor(toward)))).trunc().int()


def greater_quotient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return quotient(a, b, math.inf)


remainder = in_float32(torch.fmod)
