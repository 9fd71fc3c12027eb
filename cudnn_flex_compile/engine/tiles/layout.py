"""The layout of parts in one tensor of numbers of 4 bytes, for a list of tiles, and for the memory to make one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNED = 32  # numbers of 4 bytes: the kernels read 16 bytes at a time
Views = dict[str, Tensor]


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, with the strides of its shape. Kernels look at all of them, also at those of dimensions of
    size 1, which may be anything in a tensor that is contiguous.
    """
    return tensor.contiguous().as_strided(tensor.shape, strides_of(tensor.shape))


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense tensor of this shape."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor in another one, from the number `start` on."""

    shape: tuple[int, ...]
    start: int
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape)

    def of(self, numbers: Tensor) -> Tensor:
        part = numbers.as_strided(self.shape, strides_of(self.shape), self.start)
        return part if self.dtype is torch.int32 else part.view(self.dtype)


class Layout:
    """Parts by name, one behind the other."""

    def __init__(self) -> None:
        self.parts: dict[str, Part] = {}

    @property
    def size(self) -> int:
        """The size of all parts, in numbers."""
        return max(part.end for part in self.parts.values())

    def put(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Part:
        """A part behind all others."""
        start = -(-max((p.end for p in self.parts.values()), default=0) // ALIGNED) * ALIGNED
        self.parts[name] = Part(shape, start, dtype)
        return self.parts[name]

    def put_within(self, name: str, start: int, shape: tuple[int, ...]) -> None:
        """Another name for some numbers of a part."""
        self.parts[name] = Part(shape, start, torch.int32)

    def copy(self) -> "Layout":
        """The same parts, to which others can be added."""
        other = Layout()
        other.parts = dict(self.parts)
        return other

    def views(self, numbers: Tensor) -> Views:
        """The parts of a tensor [size], int32."""
        return {name: part.of(numbers) for name, part in self.parts.items()}
