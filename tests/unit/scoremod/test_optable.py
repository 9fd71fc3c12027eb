"""A walk over the op table: no cell is missing, each op means what torch means, and each derivative is autograd's."""

import random

import pytest
import torch

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.aten_table import DIRECT, SPECIAL
from cudnn_flex_compile.scoremod.derive import derive
from cudnn_flex_compile.scoremod.interpret import TORCH_DTYPE, evaluate
from cudnn_flex_compile.scoremod.ir import BOOL, F32, GRAD, I32, I64, SCORE, Expr
from cudnn_flex_compile.scoremod.legalize import RULES, legalize
from cudnn_flex_compile.scoremod.optable import ROWS, TABLE, Row, make
from cudnn_flex_compile.scoremod.text import infix, parse, text

SIGNATURES = {"float", "number", "compare", "logic", "integer", "where", "gather", F32, I32, I64, BOOL}
CASTS = {F32, I32, I64, BOOL}
# Rows without a derivative: integers and predicates have none, and nobody asks for second derivatives.
NO_DERIVATIVE = {
    "relu_grad", "gelu_grad", "gelu_tanh_grad", "silu_grad", "idiv", "mod", "bitand", "bitor", "bitxor",
    "lshift", "ge", "gt", "le", "lt", "eq", "ne", "and", "or", "not", "gather",
}  # fmt: skip
# Rows without a cuDNN method or legal form: never inside a kernel.
OUTSIDE = {"gather", "learned", "bitand", "bitor", "bitxor", "lshift", I64, BOOL}
# Rows that may give integers, other than truth values.
GIVES_INTEGERS = [row for row in ROWS if row.signature in ("number", "integer", "where", I32, I64)]
REFERENCES = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
    "neg": lambda a: -a, "abs": torch.abs, "sign": torch.sign, "reciprocal": lambda a: 1 / a, "min": torch.minimum,
    "max": torch.maximum, "clamp_min": lambda a, b: torch.clamp(a, min=b),
    "clamp_max": lambda a, b: torch.clamp(a, max=b),
    "exp": torch.exp, "exp2": torch.exp2, "log": torch.log,
    "sqrt": torch.sqrt, "rsqrt": lambda a: 1 / a.sqrt(), "pow": lambda a, b: a**b,
    "sin": torch.sin, "cos": torch.cos, "tan": torch.tan, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "relu": torch.nn.functional.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu,
    "gelu_tanh": lambda a: torch.nn.functional.gelu(a, approximate="tanh"), "softplus": torch.nn.functional.softplus,
    "floor": torch.floor, "ceil": torch.ceil, "where": torch.where, "learned": torch.clone, "stop": torch.detach,
}  # fmt: skip
TIED = {"min", "max", "clamp_min", "clamp_max"}


def names(rows) -> list[str]:
    return [row.name for row in rows]


@pytest.mark.parametrize("row", ROWS, ids=names(ROWS))
def test_no_cell_is_missing(row: Row) -> None:
    assert row.signature in SIGNATURES
    assert row.arity == -1 or 1 <= row.arity <= 3
    assert callable(row.evaluate)
    assert (row.backward is None) == (row.name in NO_DERIVATIVE), "a row needs a derivative, or a reason to have none"
    assert (row.interval is None) == (row not in GIVES_INTEGERS), "integers need an interval, and nothing else has one"
    in_kernel = row.cudnn is not None or row.name in RULES or row.name in CASTS
    assert in_kernel != (row.name in OUTSIDE - CASTS)
    assert (row.cudnn is None) == (row.slots == ()), "a cuDNN method has keywords"
    assert row.cudnn is None or len(row.slots) == row.arity


def test_names_and_aten_names_are_unique() -> None:
    assert len(TABLE) == len(ROWS)
    aten = [name for row in ROWS for name in row.aten or (row.name,)]
    assert len(aten) == len(set(aten))
    assert set(TABLE) == set(names(ROWS))


@pytest.mark.parametrize("name", [n for n in DIRECT if n not in SPECIAL])
def test_direct_aten_ops_exist(name: str) -> None:
    ours = ("gelu_tanh", "learned", *NO_DERIVATIVE)
    assert hasattr(torch.ops.aten, name) or name in ours, "a name that ATen does not have"
    assert DIRECT[name] in TABLE


@pytest.mark.parametrize("row", [r for r in ROWS if r.infix], ids=lambda r: r.name)
def test_infix_formats_show_every_argument(row: Row) -> None:
    shown = row.infix.format("first", "second", "third")
    assert [word in shown for word in ("first", "second", "third")] == [i < row.arity for i in range(3)]


def example(row: Row, seed: int = 0) -> tuple[list[Expr], list[torch.Tensor]]:
    """Leaves of the row's types, and float64 (or integer, or bool) values for them."""
    random = torch.Generator().manual_seed(seed)
    dtypes = {"integer": [I32] * 2, "logic": [BOOL] * 2, "where": [BOOL, F32, F32]}.get(row.signature, [F32] * 3)
    leaves = [ir.capture(i, dtype) for i, dtype in enumerate(dtypes[: row.arity])]
    values = [torch.rand(64, generator=random, dtype=torch.float64) * 3 + 0.1 for _ in leaves]
    if row.name in ("abs", "sign", "relu", "tanh", "sin", "cos", "silu", "gelu", "gelu_tanh", "neg", *TIED):
        values = [v - 1.5 for v in values]
    if row.name in TIED:
        values[1][::3] = values[0][::3]
    if row.name == "pow":
        values[1] = torch.full_like(values[1], 2.5)
    cast = {F32: lambda v: v, I32: lambda v: (v * 5 + 1).int(), BOOL: lambda v: v > 1.5}
    return leaves, [cast[leaf.dtype](v) for leaf, v in zip(leaves, values, strict=True)]


@pytest.mark.parametrize("name", REFERENCES)
def test_values(name: str) -> None:
    _, values = example(TABLE[name])
    torch.testing.assert_close(TABLE[name].evaluate(*values), REFERENCES[name](*values), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("idiv", (-7, 2), -4), ("idiv", (7, -2), -4), ("idiv", (-7, -2), 3), ("mod", (-7, 3), 2), ("mod", (7, -3), -2),
        ("and", (True, False), False), ("or", (True, False), True), ("not", (False,), True), ("ge", (2, 2), True),
        ("gt", (2, 2), False), ("le", (2, 2), True), ("lt", (2, 2), False), ("eq", (2, 2), True), ("ne", (2, 2), False),
        ("bool", (-3,), True), ("bool", (0,), False), ("f32", (True,), 1.0), ("i32", (2**32 + 1,), 1),
        ("i64", (True,), 1), ("bitand", (-7, 12), 8), ("bitor", (-8, 3), -5), ("bitxor", (-1, 5), -6),
        ("lshift", (-3, 4), -48), ("lshift", (1, 40), 2**40),
        ("relu_grad", (5.0, 0.0), 0.0), ("relu_grad", (5.0, 1e-9), 5.0),
    ],
)  # fmt: skip
def test_values_of_integers_and_predicates(name: str, args: tuple[float, ...], expected: float) -> None:
    value = TABLE[name].evaluate(*(torch.tensor(a) for a in args))
    assert value.item() == expected
    assert name not in CASTS or value.dtype == TORCH_DTYPE[name]


def drawn(row: Row, largest: int, choose: random.Random) -> list[tuple[int, int]]:
    """An interval for each argument: a divisor is not 0, the count of a shift has six bits, a condition one."""
    limits = [(-largest, largest)] * row.arity
    if row.name in ("idiv", "mod"):
        limits[1] = choose.choice([(1, largest), (-largest, -1)])
    if row.name == "lshift":
        limits[1] = (-3, 40)
    if row.name == "where":
        limits[0] = (0, 1)
    scale = choose.choice([1, 5, largest])
    ends = [sorted(max(low, min(high, choose.randint(-scale, scale))) for _ in "ab") for low, high in limits]
    return [(low, high) for low, high in ends]


def integers_of(row: Row, intervals: list[tuple[int, int]], choose: random.Random) -> list[torch.Tensor]:
    """Ends, and integers between, for each argument; a condition as a bool."""
    values = [[choose.choice([low, high, choose.randint(low, high)]) for _ in range(64)] for low, high in intervals]
    tensors = [torch.tensor(v) for v in values]
    return [tensors[0].bool(), *tensors[1:]] if row.name == "where" else tensors


@pytest.mark.parametrize("row", GIVES_INTEGERS, ids=names(GIVES_INTEGERS))
def test_intervals_bound_what_the_op_computes(row: Row) -> None:
    choose = random.Random(0)
    for _ in range(300):
        intervals = drawn(row, 2**20, choose)
        found = row.evaluate(*integers_of(row, intervals, choose))
        low, high = row.interval(*intervals)
        assert low <= found.min(), intervals
        assert found.max() <= high, intervals


@pytest.mark.parametrize("row", GIVES_INTEGERS, ids=names(GIVES_INTEGERS))
def test_what_fits_into_32_bits_is_computed_the_same_in_32(row: Row) -> None:
    """On this rests that ranges.narrow keeps values."""
    choose, compared = random.Random(0), 0
    for _ in range(300):
        values = integers_of(row, drawn(row, 2**31 - 1, choose), choose)
        wide = row.evaluate(*values)
        narrow = row.evaluate(*(v if v.dtype == torch.bool else v.int() for v in values))
        fits = (wide == wide.int()) & (wide != -(2**31))
        compared += int(fits.sum())
        assert torch.equal(wide[fits], narrow.long()[fits])
    assert compared > 1000


@pytest.mark.parametrize(
    "row", [r for r in ROWS if r.backward is not None and r.name not in CASTS], ids=lambda r: r.name
)
def test_derivatives_are_those_of_autograd(row: Row) -> None:
    """Every argument on its own, at random points; ties for those that have them."""
    leaves, values = example(row)
    weights = torch.linspace(-1, 2, 64, dtype=torch.float64)
    for i, leaf in enumerate(leaves):
        if leaf.dtype != F32 or (i == 1 and row.name in ("pow", "clamp_min", "clamp_max")):
            continue
        inputs = [v.clone().requires_grad_() if j == i else v for j, v in enumerate(values)]
        expected = autograd(REFERENCES[row.name](*inputs), inputs[i], weights)
        root = make(row.name, *(SCORE if j == i else other for j, other in enumerate(leaves)))
        gradient = derive(root)
        found = torch.zeros(64).double() if gradient is None else at(gradient, leaves, values, values[i], weights)
        tolerance = 1e-6 if row.name in ("erf", "exp2") else 1e-11  # 2 / sqrt(pi) and log(2) are float32 constants
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def autograd(value: torch.Tensor, source: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(value, source, weights, allow_unused=True)[0] if value.requires_grad else None
    return torch.zeros_like(source) if found is None else found


def at(root: Expr, leaves: list[Expr], values: list[torch.Tensor], score: torch.Tensor, weights: torch.Tensor):
    known = {**dict(zip(leaves, values, strict=True)), SCORE: score, GRAD: weights}
    leaf = lambda n: torch.full((), n.value, dtype=torch.float64) if n.kind == "const" else known[n]  # noqa: E731
    return evaluate(root, leaf, high=True).expand(score.shape)


@pytest.mark.parametrize("row", [r for r in ROWS if r.arity > 0 and r.name not in CASTS], ids=lambda r: r.name)
def test_every_row_can_be_made_written_and_read(row: Row) -> None:
    leaves, values = example(row)
    node = make(row.name, *leaves)
    assert node.kind == row.name
    assert node.args == tuple(leaves)
    result = row.evaluate(*values)
    assert {torch.float64: F32, torch.int32: I32, torch.bool: BOOL}[result.dtype] == node.dtype
    program = (
        ir.program(mask=node) if node.dtype == BOOL else ir.program(mask=make("ne", node, ir.const(0, node.dtype)))
    )
    assert parse(text(program)) is program
    assert infix(node)


@pytest.mark.parametrize("name", sorted(RULES))
def test_legal_forms_exist(name: str) -> None:
    """Every rule ends, on the row's simplest node."""
    row = TABLE[name]
    leaves = [ir.index("q"), ir.index("k"), ir.index("h")] if row.signature in ("integer", "compare") else [SCORE] * 3
    args = [*leaves[: row.arity]]
    if name in ("idiv", "mod"):
        args[1] = ir.const(2, I32)
    if name in CASTS:
        args = [make("ge", ir.index("q"), ir.index("k"))]
    if name == "where":
        args[0] = make("ge", ir.index("q"), ir.index("k"))
    assert legalize(make(name, *args)).dtype == make(name, *args).dtype


def test_make_refuses_wrong_arguments() -> None:
    with pytest.raises(KeyError):
        make("no such op", SCORE)
    with pytest.raises(TypeError, match="takes 2 arguments"):
        make("add", SCORE)
    with pytest.raises(TypeError, match="integers"):
        make("mod", SCORE, ir.index("q"))


def test_make_casts_to_the_signature() -> None:
    q, visible = ir.index("q"), make("ge", ir.index("q"), ir.index("k"))
    assert make("tanh", q).args == (ir.cast(q, F32),)
    assert make("add", visible, visible).dtype == I32
    assert make("and", q, visible).args == (ir.cast(q, BOOL), visible)
    assert make("where", q, visible, q).args == (ir.cast(q, BOOL), ir.cast(visible, I32), q)
    assert make("eq", visible, visible).args == (visible, visible)
