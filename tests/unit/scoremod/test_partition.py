"""Hoisting keeps every value: operands computed outside, the rest inside, is the function itself."""

import contextlib
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import BOOL, F32, I32, I64, SCORE
from cudnn_flex_compile.scoremod.legalize import computes
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.partition import HALF, Hoisted, ScoreGather, partition
from cudnn_flex_compile.scoremod.simplify import normalize
from cudnn_flex_compile.scoremod.text import infix
from tests.support.evaluate import SIZES, direct, masked, operands_of, program_of, scores
from tests.support.generate import Mod, mask_mods, score_mods

pytestmark = pytest.mark.any_torch
B, H, Q, KV = (ir.index(axis) for axis in ir.AXES)


@settings(max_examples=200)
@given(score_mods(), mask_mods())
def test_parts_make_the_whole(score_mod: Mod, mask_mod: Mod) -> None:
    score, visible = scores(), direct(mask_mod)
    expected = torch.where(visible, direct(score_mod, score), -math.inf)
    program, hoisted = partition(normalize(program_of(score_mod, mask_mod)))
    operands = operands_of(hoisted)
    assert_operands(program, hoisted, operands)
    got = masked(program, score, operands)
    assert torch.equal(got == -math.inf, expected == -math.inf)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def assert_operands(program: ir.Program, hoisted: list[Hoisted], operands: list[torch.Tensor]) -> None:
    """All are used; none reads the score; each is as small as can be, and none of 64 bits or of predicates."""
    nodes = list(ir.walk(program.score, program.mask))
    assert not any(node.kind == "capture" for node in nodes)
    used = {(node.value, node.dtype, node.dims) for node in nodes if node.kind == "operand"}
    dtypes = {torch.float32: F32, HALF: F32, torch.float16: F32, torch.int32: I32}
    assert used == {(i, dtypes[part.stored], part.dims) for i, part in enumerate(hoisted)}
    for part, value in zip(hoisted, operands, strict=True):
        assert not ir.depends_on(part.expression, SCORE), infix(part.expression)
        assert value.dtype == part.stored
        assert not part.limit or (int(value.min()) >= 0 and int(value.max()) <= SIZES[3])
        assert value.shape == tuple(n if axis in part.dims else 1 for axis, n in zip("bhqk", SIZES, strict=True))


def gathered(*indices: ir.Expr, dtype: str = F32, position: int = 0) -> ir.Expr:
    return make("gather", ir.capture(position, dtype), *indices)


def test_what_needs_no_pair_is_hoisted_whole() -> None:
    slope = make("exp", gathered(H)) * ir.cast(KV, F32)
    program, hoisted = partition(ir.program(SCORE + slope))
    assert infix(program.score) == "score + operand0[h, kv]"
    assert [part.expression for part in hoisted] == [slope]


def test_a_shared_part_is_hoisted_once() -> None:
    part = gathered(H) * 2.0
    program, hoisted = partition(ir.program(SCORE * part + part, make("ge", part, ir.const(0.5, F32))))
    assert infix(program.mask) == "operand1[h] > kv"  # every key or none
    assert [part.dims for part in hoisted] == ["h", "h"]


PAIRS = gathered(Q, KV)
CHOSEN = make("where", gathered(KV, Q, dtype=BOOL, position=1), PAIRS, ir.const(0.0, F32))
OF_SCORE = ir.cast(make("ge", SCORE, ir.const(0.0, F32)), I64)
QUOTIENT = make("idiv", Q - KV, ir.const(3, I32))
# Of a score: what it becomes, and the dims and dtypes of its operands where the captured tensor is bfloat16.
SCORES = [
    (SCORE + gathered(Q - KV), "score + operand0[q, kv]", [("qk", torch.bfloat16)]),
    (SCORE + PAIRS, "score + operand0[q, kv]", [("qk", torch.bfloat16)]),
    (SCORE + CHOSEN, "score + operand0[q, kv]", [("qk", torch.bfloat16)]),
    (SCORE + PAIRS * 2.0, "score + operand0[q, kv]", [("qk", torch.float32)]),
    (SCORE + gathered(H), "score + operand0[h]", [("h", torch.float32)]),
    (SCORE + gathered(Q) * gathered(KV), "score + operand0[q, kv]", [("qk", torch.float32)]),
    (SCORE + gathered(Q) + gathered(KV), "(score + operand0[q]) + operand1[kv]", [(a, torch.float32) for a in "qk"]),
    (SCORE * gathered(gathered(Q, dtype=I64, position=1)), "score * operand0[q]", [("q", torch.float32)]),
    (SCORE + ir.cast(gathered(Q, KV, dtype=I64), F32), "score + operand0[q, kv]", [("qk", torch.float32)]),
    (SCORE + make("exp2", gathered(H)), "score + operand0[h]", [("h", torch.float32)]),
    (SCORE + QUOTIENT, "score + ((q - kv) // 3)", []),
    (SCORE + make("idiv", Q - KV, ir.const(-3, I32)), "score + operand0[q, kv]", [("qk", torch.float32)]),
    (
        make("where", make("ge", gathered(Q, dtype=I64), gathered(KV, dtype=I64)), SCORE, SCORE * 2.0),
        "where(operand0[q, kv] > kv, score, score * 2)", [("qk", torch.int32)],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("score", "inside", "outside"), SCORES, ids=lambda x: infix(x) if isinstance(x, ir.Expr) else ""
)
def test_what_becomes_an_operand(score: ir.Expr, inside: str, outside: list[tuple[str, torch.dtype]]) -> None:
    program, hoisted = partition(normalize(ir.program(score)), {ir.capture(0, F32): torch.bfloat16})
    assert infix(program.score) == inside
    assert [(part.dims, part.stored) for part in hoisted] == outside
    assert computes(program.score)


@pytest.mark.parametrize("axes", ["k", "qk", "bhqk"])
def test_predicates_become_biases_that_sixteen_bits_hold(axes: str) -> None:
    flags = gathered(*(ir.index(a) for a in axes), dtype=BOOL)
    program, (bias,) = partition(normalize(ir.program(mask=make("and", flags, make("ge", Q, KV)))))
    assert (bias.stored, bias.limit, bias.dims) == (torch.bfloat16, False, axes)
    form = split(program.mask)
    assert [(b.side, b.constant) for b in form.bounds] == [("lower", 0)]
    assert [(b.kind, b.dims) for b in form.biases] == [("operand", axes)]


@pytest.mark.parametrize(("columns", "dims"), [((KV,), ["qk"]), ((ir.index("b"), KV), ["bk", "qk"])])
def test_hidden_columns_join_a_bias_over_pairs_that_does_not_grow_by_them(columns: Any, dims: list[str]) -> None:
    """As in PyTorch's paged attention: a page that is live, and no later than the query."""
    live, page = gathered(*columns, dtype=BOOL), gathered(KV, dtype=I64, position=1)
    later = make("and", make("ge", Q, page), make("ne", page * ir.const(3, I64), ir.cast(Q, I64)))
    program, hoisted = partition(normalize(ir.program(mask=make("and", live, later))))
    assert [part.dims for part in hoisted] == dims
    assert split(program.mask).residual is ir.TRUE


def test_what_the_kernel_computes_stays_inside_unless_tiles_are_skipped() -> None:
    """Beside a band, a bias leaves the mask a band."""
    odd, causal = make("eq", make("mod", Q - KV, ir.const(3, I32)), ir.const(0, I32)), make("ge", Q, KV)
    program, hoisted = partition(normalize(ir.program(mask=odd)))
    assert (program.mask, hoisted) == (odd, [])
    program, hoisted = partition(normalize(ir.program(mask=make("and", odd, causal))))
    assert [part.dims for part in hoisted] == ["qk"]
    either = make("or", causal, make("gt", ir.const(4, I32), KV))
    for mask in (either, make("and", either, make("ge", KV + ir.const(9, I32), Q))):
        assert partition(normalize(ir.program(mask=mask)))[1] == []


@pytest.mark.parametrize("index", [OF_SCORE, gathered(OF_SCORE, dtype=I64, position=1)], ids=infix)
def test_a_gather_at_the_score_is_refused(index: ir.Expr) -> None:
    with pytest.raises(ScoreGather):
        partition(ir.program(SCORE + gathered(index)))


I32_MAX, I32_MIN = 2**31 - 1, -(2**31)
SENTINELS = [I32_MAX, I32_MIN, I32_MAX - 1, 0, 3, -1]
WIDE = [2**62, -(2**62), 2**31, I32_MAX, I32_MIN, 2**40]


@pytest.mark.parametrize("compare", ["ge", "gt", "le", "lt"])
@pytest.mark.parametrize("dtype", [I32, I64])
@pytest.mark.parametrize("form", ["kv", "kv - q", "kv + 1", "captured"])
def test_sentinels_mean_no_bound(compare: str, dtype: str, form: str) -> None:
    """Captured integers at the ends of their range, as users spell "no limit"."""
    values = SENTINELS if dtype == I32 else WIDE
    limits = torch.tensor(values, dtype=torch.int32 if dtype == I32 else torch.int64)
    others = torch.tensor(values[::-1], dtype=limits.dtype)
    sides = {
        "kv": (KV, gathered(Q, dtype=dtype)),
        "kv - q": (KV - Q, gathered(Q, dtype=dtype)),
        "kv + 1": (gathered(Q, dtype=dtype), KV + ir.const(1, I32)),
        "captured": (gathered(Q, dtype=dtype), gathered(KV, dtype=dtype, position=1)),
    }
    n = len(values)
    q, kv = torch.arange(n).view(-1, 1), torch.arange(n)
    left, right = {
        "kv": (kv, limits[q]), "kv - q": (kv - q, limits[q]), "kv + 1": (limits[q], kv + 1),
        "captured": (limits[q], others[kv]),
    }[form]  # fmt: skip
    expected = getattr(torch, compare)(left, right)
    assert torch.equal(evaluated(make(compare, *sides[form]), (limits, others), n), expected)


def evaluated(mask: ir.Expr, captured: tuple[torch.Tensor, ...], n: int) -> torch.Tensor:
    from cudnn_flex_compile.passes.write.operands import operand_value
    from cudnn_flex_compile.scoremod.interpret import environment, evaluate
    from cudnn_flex_compile.scoremod.legalize import Illegal, legalize
    from cudnn_flex_compile.scoremod.masks.form import as_predicate

    program, hoisted = partition(normalize(ir.program(mask=mask)))
    sizes = (1, 1, n, n)
    operands = [operand_value(part, lambda leaf: captured[leaf.value], sizes, torch.device("cpu")) for part in hoisted]
    span = {axis: torch.arange(s, dtype=torch.int32) for axis, s in zip("bhqk", sizes, strict=True)}
    leaf = environment(torch.zeros(()), {**span, "q": span["q"].view(-1, 1)}, dict(enumerate(operands)), {}, {})
    results = [evaluate(program.mask, leaf), evaluate(as_predicate(split(program.mask)), leaf)]
    with contextlib.suppress(Illegal):  # the call is kept
        results.append(evaluate(legalize(program.mask), leaf))
    results = [r.expand(1, 1, n, n)[0, 0] for r in results]
    assert all(torch.equal(r, results[0]) for r in results)
    return results[0]
