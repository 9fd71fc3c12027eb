"""Vectors inside a function: rows of captured tensors, and values that are computed of them entry by entry.

A vector is an expression over one more index, its lane. Its shape has one dimension of a size other than 1, so that ops
which only move dimensions leave the expression as it is. A reduction makes a number of it: few entries of integers and
truth values are written out, and a float sum of products of two rows becomes a `dot` of both (dots.py). trace.py calls
these functions; they know no graphs.
"""

from collections.abc import Callable, Sequence
from typing import Any

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import BOOL, F32, I32, I64, Expr
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.views import View

MOST = 64  # entries that are written out
MOVES = (
    "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "permute", "transpose", "t", "numpy_T", "expand",
)  # fmt: skip


class NoVector(Exception):
    """A vector is used in a way that has no expression; the message says how."""


def lane_dim(sizes: Sequence[Any]) -> int | None:
    """The dimension along which a value of this shape is a vector; None for a number, of whatever dimensions."""
    dims = [dim for dim, size in enumerate(sizes) if size != 1]
    if len(dims) > 1 or any(size == 0 for size in sizes):
        raise NoVector(f"a value of {len(sizes)} dimensions inside a function, neither a number nor a vector,")
    return dims[0] if dims else None


def vector_of(view: View, shape: Sequence[Any]) -> Expr:
    """The vector, or the number, that is left of a captured tensor of this shape."""
    indices = list(view.indices)
    sizes = [shape[own] for own in view.left if own is not None]
    if any(not isinstance(size, int) for size in sizes):
        raise NoVector("a vector of a length that may change")
    _ = lane_dim(sizes)
    for own in (own for own in view.left if own is not None):
        indices[own] = ir.const(0, I64) if shape[own] == 1 else ir.lane(shape[own])
    return entry(view.source, *(i for i in indices if i is not None))


def entry(captured: Expr, *indices: Expr) -> Expr:
    """An entry of a captured tensor, or of the `stop` of one."""
    if captured.kind == "stop":
        return make("stop", make("gather", captured.args[0], *indices))
    return make("gather", captured, *indices)


def at(vector: Expr, sizes: Sequence[int], positions: dict[int, Expr]) -> Expr:
    """The entry of a vector of this shape at positions, by dimension; the vector, where its own dimension has none."""
    dim = lane_dim(sizes)
    if dim is None or dim not in positions:
        return vector
    return ir.rebuild(vector, {ir.lane(sizes[dim]): ir.cast(positions[dim], I32)})


def reduced(name: str, vector: Expr, sizes: Sequence[int], dims: Sequence[int] | None, dtype: str) -> Expr:
    """`any`, `all` or `sum` of a vector of this shape over dimensions; over all of them for None or none.

    Args:
        dtype: that of a sum.
    """
    dim = lane_dim(sizes)
    vector = ir.cast(vector, dtype if name == "sum" else BOOL)
    if dim is None or (dims and dim not in [d % len(sizes) for d in dims]):
        return vector
    if vector.dtype == F32:
        return _dot(vector, ir.lane(sizes[dim]))
    return _written_out(COMBINES[name], name, vector, sizes[dim])


COMBINES = {"any": "or", "all": "and", "sum": "add"}


def product_sum(left: Expr, right: Expr, count: int) -> Expr:
    """The sum of the products of `count` entries, which a product of vectors or matrices is."""
    product = make("mul", left, right)
    if count == 1:
        return product
    return _dot(product, ir.lane(count)) if product.dtype == F32 else _written_out("add", "a product", product, count)


def _written_out(how: str, name: str, vector: Expr, count: int) -> Expr:
    if count > MOST:
        raise NoVector(f"{name} of {count} entries, more than {MOST},")
    found = [ir.rebuild(vector, {ir.lane(count): ir.const(i, I32)}) for i in range(count)]
    while len(found) > 1:  # by halves, so that no chain of ops gets long
        pairs = [make(how, *found[i : i + 2]) for i in range(0, len(found) - 1, 2)]
        found = pairs + found[len(pairs) * 2 :]
    return found[0]


SPREAD: dict[str, Callable[..., Expr]] = {"add": lambda x, y: x + y, "sub": lambda x, y: x - y, "neg": lambda x: -x}


def _dot(vector: Expr, lane: Expr) -> Expr:
    """The sum of a float vector over the lane: dots of two rows, each times numbers."""
    if vector.kind in SPREAD and ir.depends_on(vector, lane):
        return SPREAD[vector.kind](*(_dot(a, lane) for a in vector.args))
    above, below = _factors(vector)
    rows = [f for f in above if ir.depends_on(f, lane)]
    if len(rows) != 2 or any(ir.depends_on(f, lane) for f in below):
        raise NoVector("sum of a vector that is no product of two captured rows")
    result = ir.intern("dot", F32, _sides(*rows))
    for factor in above:
        result = result if factor in rows else result * factor
    for factor in below:
        result = result / factor
    return result


def _factors(root: Expr) -> tuple[list[Expr], list[Expr]]:
    """Factors above and below the line."""
    if root.kind == "neg":
        above, below = _factors(root.args[0])
        return [*above, ir.const(-1.0, F32)], below
    if root.kind not in ("mul", "div"):
        return [root], []
    (above, below), (other_above, other_below) = map(_factors, root.args)
    if root.kind == "div":
        other_above, other_below = other_below, other_above
    return above + other_above, below + other_below


def _sides(first: Expr, second: Expr) -> tuple[Expr, Expr]:
    """The row of queries, and the row of keys."""
    turned = "k" in ir.axes_of(first) or ("q" in ir.axes_of(second) and "q" not in ir.axes_of(first))
    return (second, first) if turned else (first, second)
