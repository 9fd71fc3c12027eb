"""Allocates tensors on the current CUDA device, with as little host work as torch allows: one call for each tensor."""

from collections.abc import Callable

import torch

from cudnn_flex_compile import torch_private

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides in elements, dtype
Empty = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]
empty: Empty = torch_private.empty_on_device
