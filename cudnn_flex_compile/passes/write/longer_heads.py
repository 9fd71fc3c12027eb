"""Appends rows of captured tensors to queries and keys, so that the raw score has the dots that a score_mod adds to it.

scoremod/dots.py says which rows. All is written into the surrounding graph, where autograd goes on to the captured
tensors. The raw score of longer heads is `scale * (q . k + x . c)`, where x is the captured row `a` times factor /
scale. In bfloat16 that is exact for a power of two; for any other number, x is two rows, which hold the product to
twice the digits. In float16 a multiple might be too large or too small, so that the factor must be the scale itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node, Proxy
from torch.fx.experimental.symbolic_shapes import guard_or_false

from cudnn_flex_compile.engine.support import MAX_HEAD_DIM
from cudnn_flex_compile.passes.read.call import Call, example, hint, scale_of
from cudnn_flex_compile.passes.read.captures import Captures
from cudnn_flex_compile.passes.write.nodes import Tracer
from cudnn_flex_compile.passes.write.operands import Writer, same_size
from cudnn_flex_compile.passes.write.replace_call import with_batch
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.dots import Dot, Row
from cudnn_flex_compile.scoremod.ir import F32, Expr
from cudnn_flex_compile.scoremod.learned import reads
from cudnn_flex_compile.scoremod.partition import Hoisted

MULTIPLE = 8  # of head dims
ROUNDING = 2.0**-22  # relative: what is so near to a power of two is one, but for rounding in float32
FAR = 2.0**32  # no larger, or smaller, multiple is written


@dataclass(frozen=True, slots=True)
class Side:
    """Queries or keys, and the sizes of the axes along which rows vary.

    Attributes:
        node: the tensor, [B, H, S, D].
        axis: that of its rows: q or k.
        group: the number of query heads that share one of its heads.
    """

    node: Node
    axis: str
    group: int

    def size(self, axis: str) -> Any:
        """The size along b, h or the axis of rows."""
        return example(self.node).shape[("b", "h", self.axis).index(axis)]


def with_dots(call: Call, dots: Sequence[Dot], captures: Captures, writer: Writer) -> Call | Reason:
    """The call with longer queries and keys, or the reason why there is none."""
    key = with_batch(call.key, call) if any(ir.index("b") in dot.key.places for dot in dots) else call.key
    group = hint(example(call.query).shape[1]) // max(hint(example(key).shape[1]), 1)
    sides = Side(call.query, "q", 1), Side(key, "k", group)
    scale = ir.to_f32(scale_of(call) or 0.0)
    dtype, heads = example(call.query).dtype, [example(node).shape[1] for node in (call.query, key)]
    if not all(isinstance(n, int) for n in heads):
        return Reason(Code.VECTORS, "a dot of vectors for a number of heads that may change")
    for dot in dots:
        if reads(dot.factor, captures.learned):
            return Reason(Code.CAPTURED_GRADIENT, "a captured tensor that requires grad takes part in a dot's factor")
        why = _unfit_factor(dot.factor, scale, dtype)
        for side, row in zip(sides, (dot.query, dot.key), strict=True):
            why = why or _unfit(side, row, example(captures.nodes[row.source]), group)
        if why is not None:
            return Reason(Code.VECTORS, why)
    count = hint(example(call.query).shape[3]) + sum(_lanes(dot, scale) for dot in dots)
    total = -count % MULTIPLE + count
    if total > MAX_HEAD_DIM:
        return Reason(Code.VECTORS, f"queries and keys with vectors, of head dim {total}, more than {MAX_HEAD_DIM}")
    multiples = [_times_of(dot, scale, call, captures, writer) for dot in dots]
    appended: tuple[list[Any], list[Any]] = ([], [])
    with Tracer(call.node, example(call.query).fake_mode) as tracer:
        for dot, multiple in zip(dots, multiples, strict=True):
            row, beside = (_row(s, r, captures, tracer) for s, r in zip(sides, (dot.query, dot.key), strict=True))
            rows = _times(row, Proxy(multiple, tracer) if isinstance(multiple, Node) else multiple, dtype)
            for side, found, parts in zip(sides, (rows, [beside] * len(rows)), appended, strict=True):
                parts += [_expanded(side, part, tracer) for part in found]
        query, key = (_joined(s, p, total - count, tracer) for s, p in zip(sides, appended, strict=True))
    return replace(call, query=query, key=key)


def _multiple(factor: Expr, scale: float) -> float | None:
    """factor / scale, if it is known now."""
    if factor.kind != "const" or not scale:
        return None
    multiple = float(factor.value or 0) / scale
    if not math.isfinite(multiple) or not multiple:
        return multiple
    power = math.copysign(2.0 ** round(math.log2(abs(multiple))), multiple)
    return power if abs(multiple / power - 1) <= ROUNDING else multiple


def _is_exact(multiple: float | None) -> bool:
    """Whether a row times a number has no more digits than the row."""
    return multiple is not None and abs(math.frexp(multiple)[0]) in (0, 0.5)


def _lanes(dot: Dot, scale: float) -> int:
    return dot.query.lanes * (1 if _is_exact(_multiple(dot.factor, scale)) else 2)


def _unfit_factor(factor: Expr, scale: float, dtype: torch.dtype) -> str | None:
    """Why a factor has no form beside the call's scale, or None."""
    if not scale or not math.isfinite(scale):
        return f"a dot of vectors beside a scale of {scale:g}"
    multiple = _multiple(factor, scale)
    if dtype == torch.float16 and multiple not in (1, -1):
        given = "a factor of data" if multiple is None else f"the factor {factor.value:.7g}"
        return f"a dot of float16 vectors with {given}; with the call's scale, {scale:.7g}, it is taken"
    if multiple and not 1 / FAR <= abs(multiple) <= FAR:
        return f"a dot of vectors with the factor {factor.value:.7g}, too far from the scale {scale:.7g}"
    return None


def _unfit(side: Side, row: Row, tensor: torch.Tensor, group: int) -> str | None:
    """Why the rows cannot stand beside those of queries or keys, or None."""
    beside = example(side.node)
    if tensor.dtype != beside.dtype:
        return f"vectors of {tensor.dtype} beside queries of {beside.dtype}, in which they would lose digits"
    if type(tensor) is not type(beside) or tensor.is_nested:
        return f"vectors of type {type(tensor).__name__} beside queries of type {type(beside).__name__}"
    for place, size in zip(row.places, tensor.shape, strict=True):
        if _axis(place, side) == "h" and not _repeats(side, place):
            return f"vectors of keys that differ between heads which share a key, {group} each"
        if _axis(place, side) is not None and not _fits(size, _needed(side, place)):
            return f"a vector of a tensor of shape {tuple(tensor.shape)}, smaller than what the call reads"
    return None


def _axis(place: Expr, side: Side) -> str | None:
    """The axis of an index: b, h or that of rows; None for the lane and constants."""
    if place.kind in ("lane", "const"):
        return None
    return "h" if place.kind == "idiv" else str(place.value)


def _repeats(side: Side, place: Expr) -> int:
    """The number of the side's heads, one after another, that have one index; 0 where heads that share a key differ."""
    if place.kind != "idiv":
        return int(side.group == 1)
    heads, shared = hint(side.size("h")), int(place.args[1].value or 0)
    if shared >= heads * side.group:
        return heads
    return shared // side.group if shared % side.group == 0 else 0


def _needed(side: Side, place: Expr) -> Any:
    """The number of entries that are read by an index."""
    axis = str(_axis(place, side))
    return -(-hint(side.size("h")) // _repeats(side, place)) if axis == "h" else side.size(axis)


def _fits(size: Any, needed: Any) -> bool:
    """Whether a dimension has as many entries. Two sizes that may change are equal, under a guard; one that may change
    is not compared with a number, of which it would take the value.
    """
    if isinstance(size, int) is not isinstance(needed, int):
        return False
    return size >= needed if isinstance(size, int) else same_size(size, needed) or guard_or_false(size == needed)


def _row(side: Side, row: Row, captures: Captures, tracer: Tracer) -> Proxy:
    """The rows as [B or 1, H or 1, S or 1, lanes]."""
    tensor: Any = Proxy(captures.nodes[row.source], tracer)
    tensor = tensor.detach() if row.stopped else tensor
    for dim, place in reversed(list(enumerate(row.places))):
        size, needed = example(captures.nodes[row.source]).shape[dim], _needed_or_none(side, place)
        if place.kind == "const":
            tensor = tensor.select(dim, int(place.value or 0))
        elif isinstance(needed, int) and size != needed:
            tensor = tensor.narrow(dim, 0, needed)
    places = {_axis(p, side) or "lane": p for p in row.places if p.kind != "const"}
    wanted = ["b", "h", side.axis, "lane"]
    tensor = tensor.permute([list(places).index(name) for name in wanted if name in places])
    for dim, name in enumerate(wanted):
        tensor = tensor if name in places else tensor.unsqueeze(dim)
    return tensor if "h" not in places else _for_all_heads(side, tensor, places["h"])


def _needed_or_none(side: Side, place: Expr) -> Any:
    return None if _axis(place, side) is None else _needed(side, place)


def _for_all_heads(side: Side, tensor: Any, place: Expr) -> Any:
    """The rows with an entry for each head, or one for all."""
    repeats, heads = _repeats(side, place), hint(side.size("h"))
    if repeats in (1, heads):
        return tensor
    return tensor.repeat_interleave(repeats, dim=1).narrow(1, 0, heads)


def _times_of(dot: Dot, scale: float, call: Call, captures: Captures, writer: Writer) -> float | Node:
    """factor / scale: a number, or the node of one that data tells, [B or 1, H or 1, Sq or 1, 1]."""
    known = _multiple(dot.factor, scale)
    if known is not None:
        return known
    hoisted = Hoisted(dot.factor * ir.const(1 / scale, F32), torch.float32)
    return writer.write(hoisted, captures.nodes, call.query, call.key, call.node)


def _times(row: Any, multiple: Any, dtype: torch.dtype) -> list[Any]:
    """The rows whose sum is the row times a number or a tensor."""
    if isinstance(multiple, float) and _is_exact(multiple):
        return [row if multiple == 1.0 else row * multiple]
    wide = row.to(torch.float32) * multiple
    high = wide.to(dtype)
    # The gradient of the product is that of its first part: both parts stand beside the same row.
    return [high, (wide.detach() - high.detach().to(torch.float32)).to(dtype)]


def _expanded(side: Side, rows: Any, tracer: Tracer) -> Any:
    return rows.expand(*(tracer.size(side.node, dim) for dim in range(3)), -1)


def _joined(side: Side, appended: Sequence[Any], padding: int, tracer: Tracer) -> Node:
    """The side with appended rows, and zeros, in its order of strides: that of the output is the queries'."""
    strides = [hint(n) for n in example(side.node).stride()]
    order = [*sorted(range(3), key=lambda dim: -strides[dim]), 3]
    back = [order.index(dim) for dim in range(4)]
    parts: Any = [part.permute(order) for part in (Proxy(side.node, tracer), *appended)]
    joined: Any = torch.cat(parts, -1)
    joined = torch.nn.functional.pad(joined, (0, padding)) if padding else joined
    return joined.permute(back).node
