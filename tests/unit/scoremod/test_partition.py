"""Hoisting keeps every value: operands computed outside, the rest inside, is the function itself."""

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, I32, I64, SCORE
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.partition import Hoisted, PairGather, partition
from cudnn_flex_compile.scoremod.simplify import normalize
from cudnn_flex_compile.scoremod.text import infix
from tests.unit.evaluate import SIZES, direct, masked, operands_of, program_of, scores
from tests.unit.generate import Mod, mask_mods, score_mods

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
    """All are used, none varies along q and kv, and each is as small as can be."""
    nodes = list(ir.walk(program.score, program.mask))
    assert not any(node.kind == "capture" for node in nodes)
    used = {(node.value, node.dtype, node.dims) for node in nodes if node.kind == "operand"}
    assert used == {(i, part.dtype, part.dims) for i, part in enumerate(hoisted)}
    for part, value in zip(hoisted, operands, strict=True):
        assert not {"q", "k"} <= set(part.dims), infix(part.expression)
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
    assert len(hoisted) == 1 + (infix(program.mask) != "operand0[h] >= 0.5")


def test_a_gather_on_pairs_is_refused() -> None:
    with pytest.raises(PairGather):
        partition(ir.program(SCORE + gathered(Q - KV)))


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
    from cudnn_flex_compile.passes.hoist import operand_value
    from cudnn_flex_compile.scoremod.interpret import environment, evaluate
    from cudnn_flex_compile.scoremod.legalize import Illegal, legalize
    from cudnn_flex_compile.scoremod.masks.form import as_predicate, split

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
