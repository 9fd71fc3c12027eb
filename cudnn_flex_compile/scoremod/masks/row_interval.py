"""Bounds on kv by row: `kv < end`, `kv >= start`, with ends that are constants, scalars or row operands.

Knows nothing of the diagonal.
"""

from cudnn_flex_compile.scoremod.ir import Expr
from cudnn_flex_compile.scoremod.masks.bound import Bound, bound_of
from cudnn_flex_compile.scoremod.masks.linear import nonnegative_form


def match(predicate: Expr) -> tuple[Bound, ...] | None:
    form = nonnegative_form(predicate)
    found = bound_of(form) if form is not None else None
    return (found,) if found is not None and found.side in ("start", "end") else None
