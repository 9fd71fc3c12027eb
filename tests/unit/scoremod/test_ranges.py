"""Range analysis is sound: checked with Python integers, which do not overflow, at extreme indices."""

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import const_tensor, evaluate
from cudnn_flex_compile.scoremod.ir import BOOL, I32, I64, Expr
from cudnn_flex_compile.scoremod.optable import TABLE, make
from cudnn_flex_compile.scoremod.ranges import (
    AXIS_LIMIT,
    INT32_LIMIT,
    VALUE_LIMIT,
    interval,
    magnitude,
    narrow,
    nonnegative,
)
from cudnn_flex_compile.scoremod.text import infix

pytestmark = pytest.mark.any_torch
EXTREMES = (0, 1, 2, 7, 127, 4096, 2**20 + 1, AXIS_LIMIT - 1)
LEAVES = [*(ir.index(axis) for axis in ir.AXES), ir.scalar(0, I32), ir.operand(0, I32, "q")]
WIDEST = 2**63
CONSTANTS = (0, 1, -1, 2, 3, -5, 100, 2**15, -(2**20), VALUE_LIMIT, -VALUE_LIMIT, 2**31 - 1, -(2**31))
PYTHON = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "neg": lambda a: -a,
    "abs": abs, "min": min, "max": max, "idiv": lambda a, b: a // b, "mod": lambda a, b: a % b,
    "where": lambda c, a, b: a if c else b, "ge": lambda a, b: a >= b, "gt": lambda a, b: a > b,
    "eq": lambda a, b: a == b, "i32": lambda a: (a + 2**31) % 2**32 - 2**31, "i64": int, "clamp_min": max,
    "clamp_max": min, "bitand": lambda a, b: a & b, "bitor": lambda a, b: a | b, "bitxor": lambda a, b: a ^ b,
    "lshift": lambda a, n: a << n if 0 <= n < 64 else 0,
}  # fmt: skip


@st.composite
def integers(draw, depth: int = 4) -> Expr:
    """An I32 or I64 expression."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        leaf = draw(st.sampled_from([*LEAVES, *(ir.const(c, I32) for c in CONSTANTS), ir.const(2**40, I64)]))
        return ir.cast(leaf, I64) if draw(st.booleans()) else leaf
    kind = draw(
        st.sampled_from(
            [
                "add",
                "sub",
                "mul",
                "neg",
                "abs",
                "min",
                "max",
                "clamp_min",
                "clamp_max",
                "idiv",
                "mod",
                "where",
                "i32",
                "bitand",
                "bitor",
                "bitxor",
                "lshift",
            ]
        )
    )
    left, right = draw(integers(depth - 1)), draw(integers(depth - 1))
    if kind in ("neg", "abs"):
        return make(kind, left)
    if kind in ("idiv", "mod"):
        return make(kind, left, ir.const(draw(st.sampled_from([1, 2, 3, 64, 1000, -3])), left.dtype))
    if kind == "lshift":
        return make(kind, left, draw(st.sampled_from([ir.const(n, I32) for n in (0, 1, 5, 12, 40, -1)] + [right])))
    if kind == I32:
        return ir.cast(left, I32)
    if kind == "where":
        return make(kind, make(draw(st.sampled_from(["ge", "gt", "eq"])), left, right), right, left)
    return make(kind, left, right)


def exact(root: Expr, leaves: dict[Expr, int]) -> dict[Expr, int]:
    """The value of every node, in Python's integers."""
    values: dict[Expr, int] = {}
    for node in ir.walk(root):
        if node.kind == "const":
            values[node] = int(node.value or 0)
        else:
            values[node] = PYTHON[node.kind](*(values[a] for a in node.args)) if node.args else leaves[node]
    return values


def points(count: int) -> list[dict[Expr, int]]:
    draw = random.Random(0)
    limits = (VALUE_LIMIT, -VALUE_LIMIT, 0, 5, -5)
    return [{leaf: draw.choice(EXTREMES if leaf.kind == "index" else limits) for leaf in LEAVES} for _ in range(count)]


POINTS = points(60)


def torch_values(root: Expr) -> list[int]:
    dtypes = {I32: torch.int32, I64: torch.int64}

    def leaf(node: Expr) -> torch.Tensor:
        if node.kind == "const":
            return const_tensor(node)
        return torch.tensor([point[node] for point in POINTS], dtype=dtypes[node.dtype])

    return evaluate(root, leaf).expand(len(POINTS)).tolist()


@settings(max_examples=200)
@given(integers())
def test_no_step_is_larger_than_its_magnitude(root: Expr) -> None:
    bounds = {node: magnitude(node) for node in ir.walk(root)}
    for point in POINTS:
        values = exact(root, point)
        if max(map(abs, values.values())) > WIDEST:  # what no dtype holds, no bound has to
            assert bounds[root] >= WIDEST
            continue
        for node, value in values.items():
            assert abs(value) <= bounds[node], infix(node)


@settings(max_examples=300)
@given(integers())
def test_every_step_is_in_its_interval(root: Expr) -> None:
    """As long as no step overflows, which Python's integers do not."""
    bounds = {node: interval(node) for node in ir.walk(root)}
    for point in POINTS:
        values = exact(root, point)
        for node, value in values.items() if max(map(abs, values.values())) <= WIDEST else ():
            low, high = bounds[node]
            assert low <= value <= high, infix(node)


Q, KV = ir.index("q"), ir.index("k")
LAST = AXIS_LIMIT - 1


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        (Q, (0, LAST)), (Q - KV, (-LAST, LAST)), (-Q, (-LAST, 0)), (make("abs", Q - KV), (0, LAST)),
        (make("abs", Q + ir.const(3, I32)), (3, LAST + 3)), (make("mod", Q - KV, ir.const(64, I32)), (0, 63)),
        (make("mod", make("min", Q, ir.const(5, I32)), ir.const(64, I32)), (0, 5)),
        (make("idiv", KV - Q, ir.const(2, I32)), (-(2**23), LAST // 2)),
        (ir.scalar(0, I32), (-VALUE_LIMIT, VALUE_LIMIT)),
        (Q * ir.const(-3, I32), (-3 * LAST, 0)), (make("clamp_min", Q - KV, ir.const(-9, I32)), (-9, LAST)),
        (make("clamp_max", Q - KV, ir.const(9, I32)), (-LAST, 9)), (ir.cast(make("ge", Q, KV), I32), (0, 1)),
        (make("where", make("ge", Q, KV), Q, ir.const(-7, I32)), (-7, LAST)), (ir.cast(Q, I64), (0, LAST)),
        (make("mod", Q, ir.const(-3, I32)), (-2, 0)), (make("idiv", Q, ir.scalar(0, I32)), (-LAST, LAST)),
        (make("bitand", Q, KV), (0, LAST)), (make("bitand", Q - KV, ir.const(255, I32)), (0, 255)),
        (make("bitor", Q, ir.const(2**24, I32)), (2**24, 2**25 - 1)), (make("bitxor", Q, KV), (0, LAST)),
        (make("bitxor", Q, ir.const(-1, I32)), (-(2**24), LAST)), (make("lshift", Q, ir.const(3, I32)), (0, LAST * 8)),
        (make("lshift", Q, KV), (0, 2**63)), (ir.cast(ir.capture(0, I64), I32), (-(2**31), 2**31 - 1)),
        (ir.capture(0, I64), (-(2**63), 2**63)),
    ],
    ids=lambda x: infix(x) if isinstance(x, Expr) else "",
)  # fmt: skip
def test_intervals_are_tight(root: Expr, expected: tuple[int, int]) -> None:
    assert interval(root) == expected
    assert nonnegative(root) == (expected[0] >= 0)


@settings(max_examples=200)
@given(integers())
def test_what_is_nonnegative_is_never_negative(root: Expr) -> None:
    if nonnegative(root):
        for point in POINTS:
            values = exact(root, point)
            assert values[root] >= 0 or max(map(abs, values.values())) > WIDEST, infix(root)


@settings(max_examples=200)
@given(integers())
def test_narrow_keeps_the_value(root: Expr) -> None:
    small = narrow(root)
    assert torch_values(small) == torch_values(root)
    comparison = make("ge", root, ir.const(5, root.dtype))
    assert torch_values(narrow(comparison)) == torch_values(comparison)


@pytest.mark.parametrize("leaf", [ir.scalar(0, I32), ir.operand(0, I32, "q"), ir.capture(0, I64), ir.SCORE])
def test_nothing_is_known_of_the_sign_of_what_users_pass(leaf: Expr) -> None:
    assert not nonnegative(leaf)


def test_narrow_makes_everyday_masks_32_bit() -> None:
    q, kv = ir.cast(ir.index("q"), I64), ir.cast(ir.index("k"), I64)
    window = make("ge", ir.const(64, I64), q - kv)
    assert all(node.dtype in (I32, BOOL) for node in ir.walk(narrow(window)))


def test_narrow_keeps_64_bits_where_32_might_not_do() -> None:
    q = ir.cast(ir.index("q"), I64)
    assert narrow(q * ir.const(2**20, I64)).dtype == I64
    assert narrow(q * ir.const(100, I64)).dtype == I32


def test_an_op_without_an_interval_may_give_any_integer(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an op that someone adds is not taken to be as small as its arguments."""
    monkeypatch.setitem(TABLE, "bitor", dataclasses.replace(TABLE["bitor"], interval=None))
    q = ir.cast(ir.index("q"), I64)
    either = make("bitor", q, ir.const(1, I64))
    assert magnitude(either) > INT32_LIMIT
    assert narrow(either).dtype == I64


def test_narrow_drops_a_cast_back() -> None:
    assert narrow(ir.cast(ir.cast(ir.index("q"), I64), I32)) is ir.index("q")
