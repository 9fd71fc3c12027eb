"""Interned expressions of one attention score: what a score_mod and a mask_mod compute for (b, h, q, kv).

Every other file of the compiler reads or makes them. This one imports nothing of the package: the meaning of the ops is
in optable.py.

Nodes are immutable and hash-consed: two structurally equal expressions are the same object, so `is` is
equality, and a dictionary keyed on expressions never sees the address of a freed one (the table holds weak
references, but a key that is alive keeps its expression alive).
"""

import math
import struct
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from cudnn_flex_compile.locks import new_lock

F32, I32, I64, BOOL = "f32", "i32", "i64", "bool"
DTYPES = (F32, I32, I64, BOOL)
AXES = ("b", "h", "q", "k")

Value = int | float | bool | str | None


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Expr:
    """One node. `kind` is a leaf kind or the name of a row of the op table.

    Leaves:
        score        the scaled score, F32
        grad         the gradient with respect to the modified score, F32 (only in backward expressions)
        index        `value` names the axis: b, h, q or k; I32
        const        `value` is the Python number
        capture      `value` is the position of a captured tensor, before hoisting (never in a Program)
        operand      `value` is a position in the op's operands; `dims` are the axes along which it varies
        scalar       `value` is a position among the op's int (I32) or float (F32) scalars
        lane         the position in a vector of `value` entries; I32 (vectors.py; never in a Program)
    """

    kind: str
    dtype: str
    args: tuple["Expr", ...] = ()
    value: Value = None
    dims: str = ""

    def __add__(self, other: "Expr | float") -> "Expr":
        return arithmetic("add", self, other)

    def __sub__(self, other: "Expr | float") -> "Expr":
        return arithmetic("sub", self, other)

    def __mul__(self, other: "Expr | float") -> "Expr":
        return arithmetic("mul", self, other)

    def __truediv__(self, other: "Expr | float") -> "Expr":
        return arithmetic("div", self, other)

    def __neg__(self) -> "Expr":
        return intern("neg", self.dtype, (self,))


_table: "weakref.WeakValueDictionary[tuple[object, ...], Expr]" = weakref.WeakValueDictionary()
_lock = new_lock()


def _value_key(value: Value) -> object:
    """Tells 1, 1.0, True, 0.0, -0.0 and NaNs apart, which `==` does not."""
    if isinstance(value, float):
        return struct.pack("<d", math.nan if math.isnan(value) else value)
    return (type(value), value)


def intern(
    kind: str,
    dtype: str,
    args: tuple[Expr, ...] = (),
    value: Value = None,
    dims: str = "",
) -> Expr:
    """The one node with these fields."""
    key = (kind, dtype, args, _value_key(value), dims)
    with _lock:
        found = _table.get(key)
        if found is None:
            found = _table[key] = Expr(kind, dtype, args, value, dims)
        return found


SCORE = intern("score", F32)
GRAD = intern("grad", F32)


def index(axis: str) -> Expr:
    if axis not in AXES:
        raise ValueError(f"axis is {axis!r}, expected one of {AXES}")
    return intern("index", I32, value=axis)


def const(value: int | float | bool, dtype: str) -> Expr:
    """A number, converted to `dtype` as torch casts a 0-d tensor to that dtype: integers wrap."""
    if dtype == BOOL:
        return intern("const", BOOL, value=bool(value))
    if dtype == F32:
        return intern("const", F32, value=to_f32(float(value)))
    half = 2 ** (31 if dtype == I32 else 63)
    return intern("const", dtype, value=(int(value) + half) % (2 * half) - half)


def to_f32(value: float) -> float:
    """The nearest float32, as a Python float; beyond the range, an infinity of the same sign."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


_RANK = {BOOL: 0, I32: 1, I64: 2, F32: 3}


def promote(*dtypes: str) -> str:
    """torch's promotion among 0-d tensors of these dtypes."""
    return max(dtypes, key=_RANK.__getitem__)


def cast(node: Expr, dtype: str) -> Expr:
    """`node` as `dtype`; the kind of a cast is the name of its dtype."""
    if node.dtype == dtype:
        return node
    if node.kind == "const" and not isinstance(node.value, str) and node.value is not None:
        return const(node.value, dtype)
    return intern(dtype, dtype, (node,))


def arithmetic(name: str, left: Expr, right: "Expr | float") -> Expr:
    """The node of a binary arithmetic op; a Python number takes the other side's dtype."""
    if not isinstance(right, Expr):
        right = const(right, F32 if isinstance(right, float) else left.dtype)
    common = F32 if name == "div" else promote(left.dtype, right.dtype)
    return intern(name, common, (cast(left, common), cast(right, common)))


TRUE, FALSE = const(True, BOOL), const(False, BOOL)


def capture(position: int, dtype: str) -> Expr:
    return intern("capture", dtype, value=position)


def operand(position: int, dtype: str, dims: str) -> Expr:
    if any(d not in AXES for d in dims) or list(dims) != sorted(set(dims), key=AXES.index):
        raise ValueError(f"operand dims are {dims!r}, expected a subsequence of 'bhqk'")
    return intern("operand", dtype, value=position, dims=dims)


def lane(count: int) -> Expr:
    """The position in a vector of `count` entries."""
    return intern("lane", I32, value=count)


def scalar(position: int, dtype: str) -> Expr:
    if dtype not in (I32, F32):
        raise ValueError(f"scalar dtype is {dtype!r}, expected i32 or f32")
    return intern("scalar", dtype, value=position)


def walk(*roots: Expr) -> Iterator[Expr]:
    """Every node once, arguments before their users, in an order that depends on structure alone."""
    seen: set[Expr] = set()
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(node.args) if a not in seen)


def extent(root: Expr) -> tuple[int, int]:
    """The length of the longest chain of ops, and the number of ops, where a shared one counts once for each use."""
    found: dict[Expr, tuple[int, int]] = {}
    for node in walk(root):
        args = [found[a] for a in node.args]
        found[node] = 1 + max((depth for depth, _ in args), default=0), 1 + sum(count for _, count in args)
    return found[root]


def rebuild(root: Expr, leaf: "dict[Expr, Expr]") -> Expr:
    """`root` with the nodes that are keys of `leaf` replaced."""
    done: dict[Expr, Expr] = dict(leaf)
    for node in walk(root):
        if node not in done:
            args = tuple(done[a] for a in node.args)
            same = all(a is b for a, b in zip(args, node.args, strict=True))
            done[node] = node if same else intern(node.kind, node.dtype, args, node.value, node.dims)
    return done[root]


def axes_of(root: Expr) -> str:
    """The axes on which the value depends, in order; operands count with their dims."""
    found: set[str] = set()
    for node in walk(root):
        found.update(node.dims if node.kind == "operand" else ())
        if node.kind == "index":
            found.add(str(node.value))
    return "".join(a for a in AXES if a in found)


def depends_on(root: Expr, leaf: Expr) -> bool:
    """Whether a leaf is anywhere in an expression."""
    return any(node is leaf for node in walk(root))


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Program:
    """The computation of one call for each score: `score` where `mask` holds, -inf elsewhere. Made by `program`."""

    score: Expr
    mask: Expr


_programs: "weakref.WeakValueDictionary[tuple[Expr, Expr], Program]" = weakref.WeakValueDictionary()


def program(score: Expr = SCORE, mask: Expr = TRUE) -> Program:
    """The one program with this score (F32) and mask (BOOL)."""
    if score.dtype != F32 or mask.dtype != BOOL:
        raise TypeError(f"a program takes an f32 score and a bool mask, got {score.dtype}, {mask.dtype}")
    with _lock:
        found = _programs.get((score, mask))
        if found is None:
            found = _programs[score, mask] = Program(score, mask)
        return found
