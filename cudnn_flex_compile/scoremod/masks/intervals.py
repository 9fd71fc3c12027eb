"""The rows of a mask as intervals of keys: the positions at which each row changes between visible and hidden.

Each pair and the one before it are looked at, so the result is exact for every mask: documents in any order, offsets,
prefixes, windows. A row sees the keys in [0, e0), [e1, e2), [e3, e4) and so on, for its endpoints e0 <= e1 <= ... A row
that does not see the first key has e0 = 0. Endpoints that a row does not need are the number of keys. Tile lists are
made from them (engine/tiles). A table has them as [1 or H, n, B * Sq], int32, for an odd n.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

NARROW = 3  # endpoints of a row that one reduction finds: an interval, and a second one that starts with the first key
SEGMENT = 128  # keys of a row, in which one reduction finds NARROW endpoints of it
VIEWS = {"b": (-1, 1, 1, 1), "h": (1, -1, 1, 1), "q": (1, 1, -1, 1), "k": (1, 1, 1, -1)}


def of_one_run(start: Tensor, end: Tensor, sizes: Sequence[int], heads: int) -> Tensor:
    """The table of rows that see start <= kv < end, [B or 1, H or 1, Sq or 1] each, both the number of keys where
    nothing is seen.
    """
    shape = torch.broadcast_shapes(start.shape, end.shape)
    start, end = start.expand(shape), end.expand(shape)
    return as_table(torch.stack((torch.zeros_like(start), start, end), -1), sizes, heads)


def as_table(rows: Tensor, sizes: Sequence[int], heads: int) -> Tensor:
    """The table of endpoints, from [B or 1, H or 1, Sq or 1, n]."""
    batch, width = sizes[0], rows.shape[-1]
    rows = rows.to(torch.int32).expand(batch, heads, sizes[2], width).permute(1, 3, 0, 2)
    return rows.reshape(heads, width, batch * sizes[2])


def few_endpoints(pairs: Iterable[tuple[Tensor, Tensor]], columns: int) -> tuple[Tensor, Tensor]:
    """Up to NARROW endpoints of each row, [B or 1, H or 1, Sq, NARROW], and the most that a row has, int32.

    Where a row has more than NARROW, the endpoints are not to be used. It is one reduction over the pairs, which takes
    memory for the rows alone.

    Args:
        pairs: for one block of rows after the other, whether pairs are visible, [B or 1, H or 1, R, Skv], and whether
            the pairs at the key before are (anything before the first key).
    """
    found = [_reduced(here, previous, columns, columns) for here, previous in pairs]
    return torch.cat([ends[..., 0, :] for ends, _ in found], 2), torch.stack([n.amax() for _, n in found]).amax()


def endpoints_in_segments(
    pairs: Iterable[tuple[Tensor, Tensor]], columns: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Up to `width` endpoints of each row, [B or 1, H or 1, Sq, width], the most that a row has, int32, and whether
    these are all: a boolean scalar. They are if no SEGMENT keys of a row have more than NARROW.

    It is one reduction over the pairs, as `few_endpoints`, which says what `pairs` are. It takes memory for some
    numbers of each segment.
    """
    tables: list[Tensor] = []
    counts: list[tuple[Tensor, Tensor]] = []
    for here, previous in pairs:
        ends, count = _reduced(here, previous, columns, SEGMENT)
        rank = (count.cumsum(-1, dtype=torch.int32) - count).unsqueeze(-1) + torch.arange(NARROW, device=count.device)
        there = torch.arange(NARROW, device=count.device) < count.unsqueeze(-1)
        rank = torch.where(there, rank.clamp(max=width), width).flatten(-2)
        table = ends.new_full((*count.shape[:-1], width + 1), columns).scatter_(-1, rank.long(), ends.flatten(-2))
        tables.append(table[..., :width])
        counts.append((count.sum(-1, dtype=torch.int32).amax(), count.amax()))
    most, in_segment = (torch.stack(column).amax() for column in zip(*counts, strict=True))
    return torch.cat(tables, 2), most, in_segment <= NARROW


def _reduced(here: Tensor, previous: Tensor, columns: int, segment: int) -> tuple[Tensor, Tensor]:
    """Up to NARROW endpoints in each segment of each row, [..., segments, NARROW], and how many it has, int32. Where it
    has more, the endpoints are wrong.
    """

    def cut(t: Tensor) -> Tensor:
        beyond = -columns % segment
        return (torch.nn.functional.pad(t, (0, beyond)) if beyond else t).unflatten(-1, (-1, segment))

    place = torch.arange(columns, dtype=torch.int32, device=here.device)
    changes = cut(torch.logical_xor(here, previous | (place == 0)))  # Inductor compiles no != of truth values
    place = cut(place)
    count = changes.sum(-1, dtype=torch.int32)
    first, last = torch.where(changes, place, columns).amin(-1), torch.where(changes, place, -1).amax(-1)
    middle = torch.where(changes, place, 0).sum(-1, dtype=torch.int32) - first - last
    second = torch.where(count == 3, middle, torch.where(count == 2, last, columns))
    return torch.stack((first, second, torch.where(count == 3, last, columns)), -1), count


def of_runs_in_blocks(start: Tensor, end: Tensor, edges: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The endpoints of rows that see one run in each block of keys, [B, H, R, width], and how many a row has at most.

    Args:
        start, end: of the runs, [B, H, R, blocks], within each block; nothing is seen where start >= end.
        edges: where blocks begin, and the number of keys, [blocks + 1].
        width: more endpoints are left out.
    """
    there = torch.nn.functional.pad(start < end, (1, 1))  # with an imagined block before the first, and one at the end
    there[..., 0] = True
    to_the_end = torch.nn.functional.pad(end == edges[1:], (1, 0), value=True)
    from_the_start = torch.nn.functional.pad(start == edges[:-1], (0, 1))
    joined = there[..., :-1] & to_the_end & there[..., 1:] & from_the_start
    ends = there[..., :-1] & ~joined
    starts = there[..., 1:] & ~joined
    place = torch.stack((torch.nn.functional.pad(end, (1, 0)), torch.nn.functional.pad(start, (0, 1))), -1).flatten(-2)
    changes = torch.stack((ends, starts), -1).flatten(-2) & (place < edges[-1])
    rank = torch.where(changes, (changes.cumsum(-1) - 1).clamp(max=width), width)
    table = place.new_full((*place.shape[:-1], width + 1), 0) + edges[-1]
    return table.scatter_(-1, rank, place)[..., :width], changes.sum(-1, dtype=torch.int32).amax()


def most_endpoints(visible: Tensor) -> Tensor:
    """The most endpoints that a row has, 0-d, for some rows [B or 1, H or 1, R, Skv]."""
    return _changes(visible).sum(-1, dtype=torch.int32).amax()


def _changes(visible: Tensor) -> Tensor:
    return visible != torch.nn.functional.pad(visible[..., :-1], (1, 0), value=True)


def every_endpoint(chunks: Iterator[tuple[int, Tensor]], sizes: Sequence[int], heads: int, most: int) -> Tensor:
    """The table of as many endpoints as rows have, whatever their number.

    Args:
        chunks: the first row and the visible pairs [B or 1, heads, R, Skv] of some rows, one after the other.
        sizes: the sizes of the axes b, h, q and k.
        most: the number of endpoints for which there is room; further ones of a row are left out.
    """
    batch, _, rows, columns = sizes
    width = most | 1  # the kernels take an odd number of endpoints
    found: Tensor | None = None
    for start, visible in chunks:
        changes, count = _changes(visible), visible.shape[2]
        rank = changes.cumsum(-1).sub_(1).clamp_(max=width).masked_fill_(~changes, width)
        place = torch.arange(columns, dtype=torch.int32, device=visible.device).expand(visible.shape)
        if found is None:  # laid out as a table, for a copy may take gigabytes
            found = place.new_full((visible.shape[1], width + 1, visible.shape[0], rows), columns)
        near = found[..., start : start + count].permute(2, 0, 1, 3)
        near.scatter_(2, rank.transpose(2, 3), place.transpose(2, 3))
    assert found is not None, "there are no rows"
    return found[:, :width].expand(heads, width, batch, rows).reshape(heads, width, batch * rows)
