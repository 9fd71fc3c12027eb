"""How the queries, keys, values and gradients of users lie in memory, by name.

Knows nothing of attention. A layout makes tensors [B, H, S, D] of given shapes from `draw`, which gives a dense
tensor of any shape.
"""

from collections.abc import Callable, Sequence

import torch

Shape = tuple[int, int, int, int]
Draw = Callable[..., torch.Tensor]
Layout = Callable[[Sequence[Shape], Draw], list[torch.Tensor]]


def each(make: Callable[[Shape, Draw], torch.Tensor]) -> Layout:
    """Every tensor by itself."""
    return lambda shapes, draw: [make(shape, draw) for shape in shapes]


def _bshd(shape: Shape, draw: Draw) -> torch.Tensor:
    batch, heads, length, dim = shape
    return draw(batch, length, heads, dim).transpose(1, 2)


def _sequence_first(shape: Shape, draw: Draw) -> torch.Tensor:
    batch, heads, length, dim = shape
    return draw(length, batch, heads, dim).permute(1, 2, 0, 3)


def _cached(shape: Shape, draw: Draw) -> torch.Tensor:
    """A slice of a longer cache."""
    batch, heads, length, dim = shape
    return draw(batch, heads, length + 5, dim)[:, :, 3 : 3 + length]


def _padded_rows(shape: Shape, draw: Draw) -> torch.Tensor:
    return draw(*shape[:3], shape[3] + 8)[..., : shape[3]]


def _transposed(shape: Shape, draw: Draw) -> torch.Tensor:
    """The last stride is not 1."""
    batch, heads, length, dim = shape
    return draw(batch, heads, dim, length).transpose(2, 3)


def _misaligned(shape: Shape, draw: Draw) -> torch.Tensor:
    """Starts between two addresses that 16 divides."""
    batch, heads, length, dim = shape
    return draw(batch * heads * length * dim + 1)[1:].view(shape)


def _shared_heads(shape: Shape, draw: Draw) -> torch.Tensor:
    return draw(shape[0], 1, *shape[2:]).expand(shape)


def packed(shapes: Sequence[Shape], draw: Draw) -> list[torch.Tensor]:
    """Views of one projection [B, S, (heads of q, k, v) * D] where shapes allow; else keys and values, or none."""
    if len({(b, s, d) for b, _, s, d in shapes}) == 1:
        return _split(shapes, draw)
    if len(shapes) == 3 and len({(b, s, d) for b, _, s, d in shapes[1:]}) == 1:
        return [_bshd(shapes[0], draw), *_split(shapes[1:], draw)]
    return [_bshd(shape, draw) for shape in shapes]


def _split(shapes: Sequence[Shape], draw: Draw) -> list[torch.Tensor]:
    batch, _, length, dim = shapes[0]
    heads = [h for _, h, _, _ in shapes]
    whole = draw(batch, length, sum(heads), dim).transpose(1, 2)
    return list(whole.split(heads, dim=1))


LAYOUTS: dict[str, Layout] = {
    "BHSD": each(lambda shape, draw: draw(*shape)), "BSHD": each(_bshd), "packed": packed,
    "SBHD": each(_sequence_first), "cached": each(_cached), "padded rows": each(_padded_rows),
    "transposed": each(_transposed), "misaligned": each(_misaligned), "shared heads": each(_shared_heads),
}  # fmt: skip
# Of the output's gradient: one number comes from a sum, one row of numbers from a mean over heads and positions.
GRADIENTS: dict[str, Layout] = {
    **{name: layout for name, layout in LAYOUTS.items() if name != "packed"},
    "one number": each(lambda shape, draw: draw(1).view(()).expand(shape)),
    "one row": each(lambda shape, draw: draw(shape[0], 1, 1, shape[3]).expand(shape)),
}
