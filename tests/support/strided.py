"""Random layouts of tensors [B, H, S, D]: orders of dimensions, gaps, offsets, expanded dimensions, shared storage.

Knows nothing of attention. A layout is a list of (shape, strides, offset), for tensors that are views of one storage.
"""

import random
from collections.abc import Sequence

import torch

Shape = tuple[int, ...]
View = tuple[Shape, tuple[int, ...], int]
ROWS_APART = (0, 0, 1, 3, 8)  # elements beyond the dense step between neighbours
OFFSETS = (0, 0, 1, 8, 293)
EXPANDABLE = ((0, 1, 2), (0, 1), (0, 1), (0, 1, 2, 3))


def view_of(chance: random.Random, shape: Shape, start: int = 0, expandable: Sequence[int] = ()) -> View:
    """One tensor at `start` or after: strides in any order, with gaps; some of size 1 odd, some of these expanded."""
    order = list(range(len(shape)))
    if chance.random() < 0.7:
        chance.shuffle(order)
    if chance.random() < 0.6:  # the usual place of the last dimension
        order.remove(len(shape) - 1)
        order.append(len(shape) - 1)
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        expanded = dim in expandable and chance.random() < 0.15
        strides[dim] = 0 if expanded else step
        if shape[dim] == 1 and chance.random() < 0.3:
            strides[dim] = chance.choice((0, 1, 3, 77))
        if not expanded:
            step = step * max(shape[dim], 1) + chance.choice(ROWS_APART)
    return shape, tuple(strides), start + chance.choice(OFFSETS)


def views_of(chance: random.Random, shapes: Sequence[Shape]) -> list[View]:
    """Query, key, value, and maybe the gradient of the output; some begin in memory that an earlier one reads, too.

    Rows of keys or values are not expanded: where all are the same, gradients are zero but for the rounding.
    """
    found: list[View] = []
    for shape, expandable in zip(shapes, EXPANDABLE, strict=False):
        shared = found and chance.random() < 0.3
        found.append(view_of(chance, shape, 0 if shared or not found else end(found[-1]), expandable))
    return found


def end(view: View) -> int:
    """The first element behind a view."""
    shape, strides, offset = view
    return offset + 1 + sum(max(size - 1, 0) * stride for size, stride in zip(shape, strides, strict=True))


def tensors(views: Sequence[View], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[torch.Tensor]:
    """The views, of unit normal numbers that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(max(map(end, views)), generator=generator).to(device, dtype)
    return [torch.as_strided(flat, *view) for view in views]


def empty_like_view(view: View, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor of this layout at the beginning of its own storage, also under a fake mode."""
    return torch.empty_strided(*view[:2], dtype=dtype)
