"""Bands around the diagonal: causal, sliding windows, shifted and symmetric ones.

Knows nothing of captured tensors.
"""

from collections.abc import Iterator

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import I32, Expr
from cudnn_flex_compile.scoremod.masks.bound import Bound, bound_of
from cudnn_flex_compile.scoremod.masks.linear import Linear, linear, nonnegative_form
from cudnn_flex_compile.scoremod.ranges import INT32_LIMIT, magnitude


def match(predicate: Expr) -> tuple[Bound, ...] | None:
    """Bounds on q - kv, for `q - kv + c >= 0`, `kv - q + c >= 0` and `w >= |q - kv + c|` in any spelling."""
    found = [bound_of(form) for form in _forms(predicate)]
    if not found or any(b is None or b.side not in ("lower", "upper") for b in found):
        return None
    return tuple(b for b in found if b is not None)


def _forms(predicate: Expr) -> Iterator[Linear]:
    if predicate.kind in ("ge", "gt") and predicate.args[1].kind == "abs" and predicate.args[0].dtype == I32:
        width, (distance,) = predicate.args[0], predicate.args[1].args
        if magnitude(width) + magnitude(distance) > INT32_LIMIT:
            return
        strict = ir.const(1 if predicate.kind == "gt" else 0, I32)
        for sign in (1, -1):  # w >= |d| is w - d >= 0 and w + d >= 0
            yield linear(width).plus(linear(distance), -sign).plus(linear(strict), -1)
        return
    form = nonnegative_form(predicate)
    if form is not None:
        yield form
