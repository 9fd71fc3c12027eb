"""The rows of a mask as intervals of keys: the positions at which each row changes between visible and hidden.

The mask is evaluated at each pair and at the one before it, so the result is exact for every mask: documents in any
order, offsets, prefixes, windows. A row sees the keys in [0, e0), [e1, e2), [e3, e4) and so on, for its endpoints
e0 <= e1 <= ... A row that does not see the first key has e0 = 0. Endpoints that a row does not need are the number of
keys. Tile lists are made from them (engine/tiles).

`endpoints_of` takes FX proxies, too, and writes the nodes then: one reduction over the pairs, which takes memory for
the rows alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import TORCH_DTYPE, evaluate
from cudnn_flex_compile.scoremod.ir import F32, Expr
from cudnn_flex_compile.scoremod.saturate import INT64_LIMIT, compared

NARROW = 3  # endpoints of a row that one reduction finds: an interval, and a second one that starts with the first key
VIEWS = {"b": (-1, 1, 1, 1), "h": (1, -1, 1, 1), "q": (1, 1, -1, 1), "k": (1, 1, 1, -1)}
Sizes = tuple[Any, Any, Any, Any]


class Endpoints(NamedTuple):
    """The endpoints of a mask's rows.

    Attributes:
        table: [1 or H, n, B * Sq], int32, ascending along n.
        most: how many endpoints a row has at most, 0-d, int32. Where that is more than n, the table is not to be used.
    """

    table: Any
    most: Any


def endpoints_of(
    mask: Expr, operands: Sequence[Any], ints: Sequence[Any], floats: Sequence[Any], sizes: Sizes,
    device: torch.device,
) -> Endpoints:  # fmt: skip
    """Up to NARROW endpoints of each row.

    Args:
        mask: over indices, operands and scalars.
        operands: broadcastable to [B, H, Sq, Skv].
        ints, floats: the scalars, by position.
        sizes: of the axes b, h, q and k.
    """
    batch, heads, rows, columns = sizes
    place = torch.arange(columns, dtype=torch.int32, device=device)
    before = (place - 1).clamp(min=0).to(torch.int64)
    here, previous = (
        evaluate(mask, _leaves(mask, operands, ints, floats, sizes, at, device)) for at in (None, before)
    )  # fmt: skip
    axes = ir.axes_of(mask)
    shape = (batch if "b" in axes else 1, heads if "h" in axes else 1, rows, columns)
    changes = torch.logical_xor(here, previous | (place == 0)).expand(*shape)  # Inductor compiles no != of truth values
    count = changes.sum(-1, dtype=torch.int32)
    first, last = torch.where(changes, place, columns).amin(-1), torch.where(changes, place, -1).amax(-1)
    middle = torch.where(changes, place, 0).sum(-1, dtype=torch.int32) - first - last
    second = torch.where(count == 3, middle, torch.where(count == 2, last, columns))
    third = torch.where(count == 3, last, columns)
    table = torch.stack((first, second, third), 0).to(torch.int32).permute(2, 0, 1, 3).expand(-1, -1, batch, -1)
    return Endpoints(table.reshape(shape[1], NARROW, batch * rows), count.amax())


def _leaves(
    mask: Expr, operands: Sequence[Any], ints: Sequence[Any], floats: Sequence[Any], sizes: Sizes, at: Any,
    device: torch.device,
) -> Any:  # fmt: skip
    """Values of a mask's leaves, at all keys, or those at the positions `at`, [Skv]."""
    only_compared = compared((mask,))

    def leaf(node: Expr) -> Any:
        match node.kind:
            case "index":
                axis = str(node.value)
                if axis == "k" and at is not None:
                    return at.to(torch.int32).view(VIEWS[axis])
                size = sizes[ir.AXES.index(axis)]
                return torch.arange(size, dtype=torch.int32, device=device).view(VIEWS[axis])
            case "operand":
                value = operands[int(node.value or 0)]
                return value.index_select(3, at) if at is not None and "k" in node.dims else value
            case "scalar" if node.dtype == F32:
                return floats[int(node.value or 0)].to(torch.float32)
            case "scalar":
                number = torch.full((1, 1, 1, 1), ints[int(node.value or 0)], dtype=torch.int64, device=device)
                return number.clamp(-INT64_LIMIT, INT64_LIMIT) if node.value in only_compared else number
            case "const":
                number: Any = node.value
                return torch.full((1, 1, 1, 1), number, dtype=TORCH_DTYPE[node.dtype], device=device)
            case kind:
                raise ValueError(f"no value for a {kind} in a mask")

    return leaf


def most_endpoints(chunks: Iterator[tuple[int, Tensor]]) -> int:
    """How many endpoints a row has at most. Synchronises."""
    return max((int(_changes(visible).sum(-1).max()) for _, visible in chunks), default=0)


def _changes(visible: Tensor) -> Tensor:
    return visible != torch.nn.functional.pad(visible[..., :-1], (1, 0), value=True)


def every_endpoint(chunks: Iterator[tuple[int, Tensor]], sizes: Sequence[int], heads: int, most: int) -> Tensor:
    """The table of as many endpoints as rows have, whatever their number.

    Args:
        chunks: the first row and the visible pairs [B or 1, heads, R, Skv] of some rows, one after the other.
        sizes: of the axes b, h, q and k.
        most: at least how many endpoints a row has at most.
    """
    batch, _, rows, columns = sizes
    width = most | 1  # the kernels take an odd number of endpoints
    parts: list[Tensor] = []
    for _, visible in chunks:
        changes = _changes(visible)
        where = torch.where(changes, changes.cumsum(-1) - 1, width)
        place = torch.arange(columns, dtype=torch.int32, device=visible.device).expand(visible.shape)
        part = place.new_full((*visible.shape[:3], width + 1), columns)
        parts.append(part.scatter_(-1, where, place)[..., :width])
    table = torch.cat(parts, 2).permute(1, 3, 0, 2).expand(heads, width, batch, rows)
    return table.reshape(heads, width, batch * rows)
