"""Brings run-time integers of any size into the range in which a program computes exactly.

Users write the largest integer for "no limit". A number that is only compared, in sums with far smaller ones, may be
brought back to a limit beyond all of these, and no comparison changes. A number that is read in another way stays. The
kernels call these functions with a call's integers.
"""

import functools
from collections.abc import Sequence

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, I32, I64, Expr
from cudnn_flex_compile.scoremod.masks.linear import Linear, linear
from cudnn_flex_compile.scoremod.ranges import AXIS_LIMIT, INT32_LIMIT, VALUE_LIMIT, interval, magnitude

INT64_LIMIT = 2**61  # sums of some such numbers and of indices do not wrap
ORDER = ("ge", "gt", "le", "lt")
UNBOUNDED = 2**64


def saturated(roots: tuple[Expr, ...], ints: Sequence[int], limit: int = VALUE_LIMIT) -> list[int]:
    """The integers, with those beyond the limit brought back to it where that changes no value of the expressions."""
    if all(abs(number) <= limit for number in ints):
        return list(ints)
    uses = compared(roots)
    found = list(ints)
    for position, number in enumerate(ints):
        forms = uses.get(position)
        if abs(number) > limit and forms is not None and all(_rest(f, position, ints) < limit for f in forms):
            found[position] = limit if number > 0 else -limit
    return found


def exact(roots: tuple[Expr, ...], ints: Sequence[int]) -> list[int]:
    """The integers for an evaluation with 64 bits, in which no comparison of sums wraps."""
    return saturated(roots, saturated(roots, ints), INT64_LIMIT)


@functools.lru_cache(256)
def compared(roots: tuple[Expr, ...]) -> dict[int, tuple[Linear, ...]]:
    """The scalars that are read in ordering comparisons alone, and the difference of both sides of each comparison.

    A scalar that is not read at all is among them.
    """
    forms: dict[int, list[Linear]] = {i: [] for i in range(1 + max(map(_last, roots), default=-1))}
    other: set[int] = set()
    stack: list[Expr] = list(roots)
    seen: set[Expr] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if _scalar(node):
            other.add(int(node.value or 0))
        elif node.kind in ORDER and node.args[0].dtype in (I32, I64):
            form = linear(node.args[0]).plus(linear(node.args[1]), -1)
            stack += [atom for atom in form.factors if not _scalar(atom)]
            for atom in filter(_scalar, form.factors):
                forms[int(atom.value or 0)].append(form)
        else:
            stack.extend(node.args)
    return {position: tuple(found) for position, found in forms.items() if position not in other}


def _scalar(node: Expr) -> bool:
    return node.kind == "scalar" and node.dtype != F32


def _last(root: Expr) -> int:
    return max((int(node.value or 0) for node in ir.walk(root) if _scalar(node)), default=-1)


def _rest(form: Linear, position: int, ints: Sequence[int]) -> int:
    """A bound of the form without the scalar at a position."""
    total = abs(form.constant)
    for atom, factor in form.factors.items():
        if not _scalar(atom):
            total += abs(factor) * _size(atom)
        elif atom.value != position:
            total += abs(factor * ints[int(atom.value or 0)])
    return total


def _size(atom: Expr) -> int:
    """A bound of |value| for the longest axes."""
    if atom.kind == "operand" and atom.dtype == I32:
        return INT32_LIMIT + 1
    leaves = {node.kind for node in ir.walk(atom) if not node.args}
    return max(map(abs, interval(atom))) if leaves <= {"index", "const"} else UNBOUNDED


@functools.lru_cache(1024)
def limit_of(roots: tuple[Expr, ...], longest: int) -> int:
    """The size of its integers up to which a program never leaves 32 bits, where no axis is longer than `longest`."""
    sums = [n for n in ir.walk(*roots) if n.args and n.dtype == I32 and _last(n) >= 0]
    leaves = [n for n in ir.walk(*roots) if n.kind in ("scalar", "index") and n.dtype == I32]
    for bits in range(VALUE_LIMIT.bit_length() - 1, 0, -1):
        sizes = {n: ir.const(2**bits if n.kind == "scalar" else min(longest, AXIS_LIMIT), I32) for n in leaves}
        if all(magnitude(ir.rebuild(node, sizes)) <= INT32_LIMIT for node in sums):
            return 2**bits
    return 0
