"""Views of captured tensors that a function indexes step by step, as in `bias[b][h][q, kv]`.

trace.py calls these functions with the arguments of a graph's nodes; they know no graphs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, I64, Expr


@dataclass(frozen=True, slots=True)
class View:
    """A captured tensor, some of whose dimensions are indexed.

    Attributes:
        source: the captured tensor's leaf, or the `stop` of it where it is detached.
        indices: the index of each of its dimensions, None for one that is still to be indexed.
        left: the tensor's dimension for each dimension of the view; None for one of size 1 that it does not have.
    """

    source: Expr
    indices: tuple[Expr | None, ...]
    left: tuple[int | None, ...]


def view_of(source: Expr, dims: int) -> View:
    """The whole tensor."""
    return View(source, (None,) * dims, tuple(range(dims)))


def _indexed(view: View, chosen: dict[int, Expr]) -> View:
    indices = list(view.indices)
    for dim, position in chosen.items():
        own = view.left[dim]
        if own is not None:
            indices[own] = position
    left = tuple(own for dim, own in enumerate(view.left) if dim not in chosen)
    return replace(view, indices=tuple(indices), left=left)


def _index(view: View, indices: Sequence[Expr | None]) -> View:
    return _indexed(view, {dim: position for dim, position in enumerate(indices) if position is not None})


def _select(view: View, dim: int, position: int) -> View:
    return _indexed(view, {dim % len(view.left): ir.const(position, I64)})


def _permute(view: View, order: Sequence[int]) -> View:
    return replace(view, left=tuple(view.left[dim] for dim in order))


def _transpose(view: View, first: int, second: int) -> View:
    order = list(range(len(view.left)))
    order[first], order[second] = order[second], order[first]
    return _permute(view, order)


def _turned(view: View) -> View:
    return _permute(view, range(len(view.left))[::-1])


def _unsqueeze(view: View, dim: int) -> View:
    left = list(view.left)
    left.insert(dim % (len(left) + 1), None)
    return replace(view, left=tuple(left))


def _same(view: View) -> View:
    return view


def _detached(view: View) -> View:
    stopped = view.source.dtype != F32 or view.source.kind == "stop"
    return view if stopped else replace(view, source=ir.intern("stop", F32, (view.source,)))


VIEWS: dict[str, Callable[..., View]] = {
    "index": _index, "select": _select, "permute": _permute, "transpose": _transpose, "t": _turned,
    "numpy_T": _turned, "unsqueeze": _unsqueeze, "alias": _same, "detach": _detached,
}  # fmt: skip


def squeezed(view: View, sizes: Sequence[Any], dims: Sequence[int]) -> View:
    """The view without those of `dims` that have size 1: their index is 0."""
    gone = [dim % len(sizes) for dim in dims]
    return _indexed(view, {dim: ir.const(0, I64) for dim in gone if sizes[dim] == 1})
