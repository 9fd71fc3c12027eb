"""Interning: equal structure is the same object, also between threads, and nothing is kept for ever."""

import gc
import math
import threading
import weakref

import pytest

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import BOOL, F32, FALSE, I32, I64, SCORE, TRUE, Expr
from cudnn_flex_compile.scoremod.optable import make

Q, KV = ir.index("q"), ir.index("k")


def test_equal_structure_is_the_same_object() -> None:
    assert SCORE * 2.0 + Q is SCORE * 2.0 + Q
    assert ir.program(SCORE * 2.0) is ir.program(SCORE * 2.0)
    assert ir.operand(0, I32, "bq") is ir.operand(0, I32, "bq")


def test_every_field_matters() -> None:
    base = {"kind": "operand", "dtype": F32, "args": (), "value": 0, "dims": "q"}
    others = [{}, {"kind": "scalar"}, {"dtype": I32}, {"args": (SCORE,)}, {"value": 1}, {"value": False}, {"dims": "k"}]
    nodes = [ir.intern(**{**base, **other}) for other in others]
    assert len(set(nodes)) == len(others)


@pytest.mark.parametrize(
    "values", [(1, True, 1.0), (0, False, 0.0, -0.0), (math.nan, math.inf, -math.inf), ("1", 1), (None, 0)]
)
def test_numbers_that_compare_equal_are_told_apart(values: tuple[object, ...]) -> None:
    nodes = [ir.intern("const", F32, value=v) for v in values]
    assert len(set(nodes)) == len(values)
    assert all(type(node.value) is type(v) for node, v in zip(nodes, values, strict=True))


def test_all_nans_are_one() -> None:
    assert ir.const(math.nan, F32) is ir.const(-math.nan, F32)


def test_expressions_are_freed() -> None:
    node = make("tanh", SCORE * 123.456) + KV
    inner, outer, size = weakref.ref(node.args[0]), weakref.ref(node), len(ir._table)
    kept = ir.program(node)
    del node
    gc.collect()
    assert outer() is kept.score
    assert inner() is kept.score.args[0]
    del kept
    gc.collect()
    assert outer() is None
    assert inner() is None
    assert len(ir._table) < size


def test_a_freed_expression_comes_back_whole() -> None:
    for _ in range(50):
        node = make("exp", SCORE * 77.25)
        assert node.args[0].args == (SCORE, ir.const(77.25, F32))
        del node
    gc.collect()
    assert make("exp", SCORE * 77.25) is make("exp", SCORE * 77.25)


def test_threads_get_the_same_objects() -> None:
    """Eight threads build the same 60 expressions, again and again, while they are freed and made anew."""
    threads, rounds, size = 8, 5, 60
    start, meet = threading.Barrier(threads), threading.Barrier(threads)
    made: list[list[ir.Program]] = [[] for _ in range(threads)]
    failures: list[str] = []

    def build(me: int) -> None:
        try:
            for _ in range(rounds):
                start.wait(timeout=60)
                made[me] = [_program(i) for i in range(size)]
                meet.wait(timeout=60)
                if any(a is not b for other in made for a, b in zip(made[me], other, strict=True)):
                    failures.append(f"thread {me} has an expression of its own")
                start.wait(timeout=60)
                made[me] = []
                meet.wait(timeout=60)
        except BaseException as error:
            failures.append(repr(error))
            start.abort()
            meet.abort()

    workers = [threading.Thread(target=build, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert not failures


def _program(seed: int) -> ir.Program:
    score = SCORE
    for i in range(10):
        score = make("tanh", score * (seed + i / 7.0)) + Q
    return ir.program(score, make("ge", Q + ir.const(seed, I32), KV))


def test_expressions_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        SCORE.value = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("value", "dtype", "stored"),
    [
        (3, F32, 3.0), (0.1, F32, 0.10000000149011612), (1e300, F32, math.inf), (-1e300, F32, -math.inf), (2.7, I32, 2),
        (-2.7, I32, -2), (2**31, I32, -(2**31)), (-(2**31), I32, -(2**31)), (2**32 + 7, I32, 7), (2**63, I64, -(2**63)),
        (True, I32, 1), (0.5, BOOL, True), (0, BOOL, False), (math.nan, BOOL, True), (2**24 + 1, F32, float(2**24)),
    ],
)  # fmt: skip
def test_constants_are_what_torch_stores(value: float, dtype: str, stored: float) -> None:
    node = ir.const(value, dtype)
    assert node.value == stored
    assert type(node.value) is type(stored)


def test_casts() -> None:
    assert ir.cast(SCORE, F32) is SCORE
    assert ir.cast(ir.const(2**40 + 3, I64), I32) is ir.const(3, I32)
    assert ir.cast(TRUE, F32) is ir.const(1.0, F32)
    assert ir.cast(Q, I64).dtype == I64
    assert ir.promote(BOOL, I32) == I32
    assert ir.promote(I64, I32, BOOL) == I64
    assert ir.promote(F32, I64) == F32


def test_arithmetic_promotes_as_torch_does() -> None:
    assert (Q + 1).dtype == I32
    assert (Q + 1.5).dtype == F32
    assert (Q / KV).dtype == F32
    assert (SCORE - KV).args[1] is ir.cast(KV, F32)
    assert (Q * ir.cast(KV, I64)).dtype == I64


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ir.index("x"), lambda: ir.operand(0, I32, "qb"), lambda: ir.operand(0, I32, "qq"),
        lambda: ir.operand(0, I32, "z"), lambda: ir.scalar(0, I64), lambda: ir.scalar(0, BOOL),
    ],
)  # fmt: skip
def test_misuse_is_a_value_error(wrong) -> None:
    with pytest.raises(ValueError, match="expected"):
        wrong()


@pytest.mark.parametrize(("score", "mask"), [(Q, TRUE), (SCORE, Q), (TRUE, TRUE), (SCORE, SCORE)])
def test_a_program_has_a_float_and_a_bool(score: Expr, mask: Expr) -> None:
    with pytest.raises(TypeError, match="f32"):
        ir.program(score, mask)


def test_walk_visits_every_node_once_and_arguments_first() -> None:
    shared = SCORE * 3.0
    root = make("where", make("ge", Q, KV), shared + shared, make("exp", shared))
    order = list(ir.walk(root, shared, TRUE))
    assert len(order) == len(set(order))
    assert all(order.index(a) < order.index(node) for node in order for a in node.args)
    assert order[-1] is TRUE
    assert list(ir.walk(root)) == list(ir.walk(root))


def test_walk_is_not_recursive() -> None:
    deep = SCORE
    for _ in range(5000):
        deep = make("tanh", deep)
    assert len(list(ir.walk(deep))) == 5001
    assert len(list(ir.walk(ir.rebuild(deep, {SCORE: SCORE * 2.0})))) == 5003


def test_rebuild_replaces_leaves_and_shares_the_rest() -> None:
    root = SCORE * 2.0 + KV
    assert ir.rebuild(root, {}) is root
    assert ir.rebuild(root, {KV: Q}) is SCORE * 2.0 + Q
    assert ir.rebuild(root, {root: SCORE}) is SCORE


def test_axes() -> None:
    root = ir.operand(0, F32, "bk") * ir.cast(ir.index("h"), F32)
    assert ir.axes_of(root) == "bhk"
    assert ir.axes_of(SCORE) == ""
    assert ir.depends_on(root, ir.index("h"))
    assert not ir.depends_on(root, SCORE)
    assert TRUE is not FALSE
