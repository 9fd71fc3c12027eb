"""Moves the visible keys to the front, where a mask hides columns, so that padding becomes a limit of each row.

lower_call.py asks for the program over permuted keys; passes/write/operands.py permutes. A mask such as
`causal & padding[b, kv]`, with padding of any content, hides the same keys from every query. With the visible keys
first, in their order, query q sees the keys below the number of visible ones that its other bounds admit. That is a
limit of its row, exact for any content, and the host need not read the data. Keys and values are permuted, and their
gradients permuted back: attention does not depend on the order of keys, and scores that read it are not compacted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.hoisting import LENGTH
from cudnn_flex_compile.scoremod.ir import I32, I64, TRUE, Expr, Program
from cudnn_flex_compile.scoremod.masks.bound import Bound
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.masks.linear import KV
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.partition import Hoisted
from cudnn_flex_compile.scoremod.ranges import VALUE_LIMIT
from cudnn_flex_compile.scoremod.simplify import simplify


@dataclass(frozen=True, slots=True)
class Compact:
    """A program over permuted keys.

    Attributes:
        program: with row limits in place of the columns' bias.
        hoisted: its operands; they read COUNTS.
        columns: the bias that tells which keys are visible.
    """

    program: Program
    hoisted: tuple[Hoisted, ...]
    columns: Hoisted


COUNTS = ir.capture(-1, I64)  # [B or 1, Skv + 1]: the number of visible keys before each position


def compacted(program: Program, hoisted: Sequence[Hoisted]) -> Compact | None:
    """The program over permuted keys, or None where a bias is the better form.

    A bias is better where anything reads the key's position, and under a window, whose tiles are skipped only in place.
    """
    form = split(program.mask)
    window = any(bound.diagonal and not bound.at_most for bound in form.bounds)
    if window or not form.rows_are_intervals or len(form.biases) != 1:
        return None
    if "h" in form.biases[0].dims or "k" in ir.axes_of(program.score):
        return None
    columns = hoisted[int(form.biases[0].value or 0)]
    used = [n for n in ir.walk(program.score) if n.kind == "operand"]
    kept = sorted({int(n.value or 0) for n in used})
    operands = [hoisted[i] for i in kept]
    moved = {n: ir.operand(kept.index(int(n.value or 0)), n.dtype, n.dims) for n in used}
    mask = TRUE
    for bound in form.bounds:  # kv' <= kv: a bound of kv from above bounds the permuted key, too, and skips tiles
        if bound.at_most and bound.diagonal and not any(t.kind == "operand" for _, t in bound.terms):
            mask = make("and", mask, bound.predicate())
    for at_most in (False, True):
        limit = _limit(form.bounds, hoisted, at_most)
        if limit is None:
            continue
        found = make("gather", COUNTS, _batch(columns), limit)
        operands.append(Hoisted(found, torch.int32, limit=True))
        operand = ir.operand(len(operands) - 1, I32, operands[-1].dims)
        mask = make("and", mask, make("gt", operand, KV) if at_most else make("ge", KV, operand))
    score = ir.rebuild(program.score, dict(moved))
    return Compact(ir.program(score, simplify(mask)), tuple(operands), columns)


def _batch(columns: Hoisted) -> Expr:
    return ir.index("b") if "b" in columns.dims else ir.const(0, I64)


def _limit(bounds: tuple[Bound, ...], hoisted: Sequence[Hoisted], at_most: bool) -> Expr | None:
    """The position before which, or from which, keys are visible to a query by its bounds; LENGTH stands for all."""
    positions = [_position(bound, hoisted) for bound in bounds if bound.at_most == at_most]
    if not positions and not at_most:
        return None
    limit = LENGTH if at_most else ir.const(0, I64)
    for position in positions:
        limit = make("min" if at_most else "max", limit, position)
    return make("min", make("max", limit, ir.const(0, I64)), LENGTH)


def _position(bound: Bound, hoisted: Sequence[Hoisted]) -> Expr:
    """The first key that a bound lets a query see, or the one after the last, over the values of its operands."""
    operands = [term for _, term in bound.terms if term.kind == "operand"]
    values = {operand: _clamped(hoisted[int(operand.value or 0)].expression) for operand in operands}
    return bound.limit().shifted(int(bound.at_most)).replaced(values).expression()


def _clamped(expression: Expr) -> Expr:
    least, most = (ir.const(n, I64) for n in (-VALUE_LIMIT, VALUE_LIMIT))
    return make("min", make("max", ir.cast(expression, I64), least), most)


def counts_of(bias: Any) -> Any:
    """COUNTS, from the columns' bias [B or 1, 1, 1, Skv], a tensor or a proxy."""
    running = (bias >= 0).to(torch.int64).cumsum(-1).flatten(0, 2)
    return torch.nn.functional.pad(running, (1, 0))


def slots_of(bias: Any, counts: Any, span: Any) -> Any:
    """The place to which each key goes, [B or 1, Skv], visible ones first, in their order.

    Args:
        span: 0, 1, ... Skv - 1.
    """
    before = counts[:, :-1]
    return torch.where((bias >= 0).flatten(0, 2), before, counts[:, -1:] + span - before)


def order_of(slots: Any, span: Any) -> Any:
    """The key that comes to each place: the inverse of `slots_of`."""
    return torch.zeros_like(slots).scatter(-1, slots, span.expand_as(slots))
