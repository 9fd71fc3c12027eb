"""Allocates on the current CUDA device, with as little host work as torch allows.

Knows nothing of attention. Inductor's generated code allocates by the same function; it is private, so where it is
missing, `torch.empty_strided` runs.
"""

from collections.abc import Callable

import torch

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides in elements, dtype
Empty = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]


def _empty_strided(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="cuda")


empty: Empty = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", _empty_strided)  # pyright: ignore
