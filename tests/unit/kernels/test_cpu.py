"""The CPU kernels against dense attention in float64 with autograd, for generated and for everyday functions."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings

from cudnn_flex_compile.kernels import cpu
from cudnn_flex_compile.kernels.arguments import Arguments
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, I32, TRUE
from cudnn_flex_compile.scoremod.learned import with_bias
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.partition import partition
from cudnn_flex_compile.scoremod.simplify import normalize
from cudnn_flex_compile.scoremod.text import text
from cudnn_flex_compile.scoremod.trace import trace
from tests.support.evaluate import CPU, SIZES, direct, operands_of, program_of
from tests.support.generate import B, H, K, Mod, Q, mask_mods, score_mods

Masked = Callable[[torch.Tensor], torch.Tensor]  # [B, H, Sq, Skv] scores -> modified, -inf where masked


def inputs(
    batch: int, heads: int, kv_heads: int, rows: int, columns: int, dims: tuple[int, int] = (8, 8), seed: int = 0
):
    """query, key, value and the output's gradient; scores are multiples of 1/32, exact in float32."""
    random = torch.Generator().manual_seed(seed)

    def grid(*shape: int) -> torch.Tensor:
        return torch.randint(-4, 5, shape, generator=random) / 4

    (dim, value_dim), n = dims, (batch, kv_heads, columns)
    return grid(batch, heads, rows, dim), grid(*n, dim), grid(*n, value_dim), grid(batch, heads, rows, value_dim)


def reference(query, key, value, grad, masked: Masked, scale: float, dtype: torch.dtype, grad_lse=None, more=()):
    """out, natural log-sum-exp, dQ, dK, dV, and the gradients of `more`: plain dense attention, rows without a visible
    key giving zeros.
    """
    leaves = [*(t.to(dtype).requires_grad_() for t in (query, key, value)), *more]
    group = query.shape[1] // key.shape[1]
    keys, values = (t.repeat_interleave(group, 1) for t in leaves[1:3])
    scores = masked(leaves[0] @ keys.transpose(-2, -1) * scale)
    seen = (scores > -math.inf).any(-1, keepdim=True)
    safe = torch.where(seen, scores, 0.0)
    lse = safe.logsumexp(-1)
    out = torch.exp(safe - lse.unsqueeze(-1)) * seen @ values  # from the log-sum-exp, as flash attention's backward
    loss = (out * grad.to(dtype)).sum()
    if grad_lse is not None:
        loss = loss + (lse * grad_lse.to(dtype) * seen.squeeze(-1)).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]
    return [out.detach(), torch.where(seen.squeeze(-1), lse, -math.inf).detach(), *gradients]


def computed(query, key, value, grad, program: str, operands, scale: float, ints=(), floats=(), grad_lse=None):
    out = torch.full((*query.shape[:3], value.shape[3]), math.nan, dtype=query.dtype)
    stats = torch.full(query.shape[:3], math.nan)
    given = Arguments(operands, ints, floats, program, scale)
    cpu.forward(query, key, value, given, out, stats)
    gradients = cpu.backward(grad, grad_lse, query, key, value, out, stats, given)
    return [out, stats, *gradients]


def assert_right(got: list[torch.Tensor], tensors, masked: Masked, scale: float, **extra) -> None:
    """No further from float64 than twice what float32 is."""
    exact = reference(*tensors, masked, scale, torch.float64, **extra)
    stock = reference(*tensors, masked, scale, torch.float32, **extra)
    for name, mine, right, low in zip(("out", "lse", "dq", "dk", "dv"), got, exact, stock, strict=True):
        assert mine.shape == right.shape
        assert torch.equal(mine.isinf(), right.isinf()), name
        finite = right.isfinite()
        error, allowed, size = ([*x[finite].abs().tolist(), 0.0] for x in (mine - right, low - right, right))
        assert max(error) <= 2 * max(allowed) + 2e-6 * (1 + max(size)), name


def blocks_of(monkeypatch: pytest.MonkeyPatch, rows: int, per_row: int) -> None:
    monkeypatch.setattr(cpu, "BLOCK_ELEMENTS", rows * per_row)


@pytest.mark.parametrize("rows_at_once", [1, 2, 100])
def test_generated_functions(monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    blocks_of(monkeypatch, rows_at_once, B * H * K)
    tensors = inputs(B, H, 1, Q, K, seed=rows_at_once)
    grad_lse = torch.linspace(-1, 1, B * H * Q).view(B, H, Q)

    @settings(max_examples=50)
    @given(score_mods(), mask_mods())
    def check(score_mod: Mod, mask_mod: Mod) -> None:
        visible = direct(mask_mod).view(SIZES)

        def masked(scores: torch.Tensor) -> torch.Tensor:
            modified = direct(score_mod, scores.reshape(-1)).view(SIZES)
            return torch.where(visible, modified, -math.inf)

        program, hoisted = partition(normalize(program_of(score_mod, mask_mod)))
        for extra in ({}, {"grad_lse": grad_lse}):
            got = computed(*tensors, text(program), operands_of(hoisted), 0.5, **extra)
            assert_right(got, tensors, masked, 0.5, **extra)

    check()


SCORE_MODS = {
    "none": None,
    "softcap": lambda s, b, h, q, kv: torch.tanh(s / 2) * 2,
    "relative": lambda s, b, h, q, kv: s + (q - kv) * 0.25,
    "alibi": lambda s, b, h, q, kv: s - 0.5 * (h + 1) * (q - kv),
    "clamp": lambda s, b, h, q, kv: s.clamp(-0.5, 0.5),
    "constant": lambda s, b, h, q, kv: torch.zeros_like(s) + kv * 0.125,
    "per batch": lambda s, b, h, q, kv: s * (b + 1),
    "where": lambda s, b, h, q, kv: torch.where(q >= kv, s, s * 0.5),
    "inner infinity": lambda s, b, h, q, kv: torch.where(kv == 1, float("-inf"), s) + 1,
}
MASK_MODS = {
    "none": None,
    "causal": lambda b, h, q, kv: q >= kv,
    "window": lambda b, h, q, kv: (q >= kv) & (q - kv <= 2),
    "some rows see nothing": lambda b, h, q, kv: (q % 2 == 1) & (kv <= q),
    "one batch sees nothing": lambda b, h, q, kv: (b == 1) & (q >= kv),
    "nothing": lambda b, h, q, kv: q < 0,
    "per head": lambda b, h, q, kv: kv % (h + 1) == 0,
}
SHAPES = {
    "plain": (2, 4, 4, 6, 6), "grouped": (2, 4, 2, 6, 7), "multi-query": (2, 4, 1, 3, 9), "one row": (2, 4, 2, 1, 9),
    "one column": (2, 4, 2, 9, 1), "one of each": (1, 1, 1, 1, 1), "more rows": (2, 2, 2, 9, 3),
}  # fmt: skip


@functools.cache
def traced_program(score_mod, mask_mod) -> ir.Program:
    score = ir.SCORE if score_mod is None else trace(score_mod, True, [], CPU)
    mask = TRUE if mask_mod is None else trace(mask_mod, False, [], CPU)
    return normalize(ir.program(score, mask))


def masked_by(score_mod, mask_mod) -> Masked:
    def masked(scores: torch.Tensor) -> torch.Tensor:
        where = [torch.arange(n).view([-1 if i == d else 1 for i in range(4)]) for d, n in enumerate(scores.shape)]
        modified = scores if score_mod is None else score_mod(scores, *where).to(scores.dtype)
        return modified if mask_mod is None else torch.where(mask_mod(*where), modified, -math.inf)

    return masked


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask_name", MASK_MODS)
@pytest.mark.parametrize("score_name", SCORE_MODS)
def test_everyday_functions(score_name: str, mask_name: str, shape: str) -> None:
    score_mod, mask_mod = SCORE_MODS[score_name], MASK_MODS[mask_name]
    program, hoisted = partition(traced_program(score_mod, mask_mod))
    tensors = inputs(*SHAPES[shape], dims=(8, 16))
    operands = [_operand(h, tensors) for h in hoisted]
    got = computed(*tensors, text(program), operands, 0.5)
    assert_right(got, tensors, masked_by(score_mod, mask_mod), 0.5)


def _operand(hoisted, tensors) -> torch.Tensor:
    from cudnn_flex_compile.passes.write.operands import operand_value

    return operand_value(hoisted, {}.__getitem__, (*tensors[0].shape[:3], tensors[1].shape[2]), CPU)


@pytest.mark.parametrize("mask_name", MASK_MODS)
def test_the_gradient_of_the_log_sum_exp(mask_name: str) -> None:
    score_mod, mask_mod = SCORE_MODS["softcap"], MASK_MODS[mask_name]
    tensors = inputs(2, 4, 2, 6, 7)
    grad_lse = torch.linspace(-1, 1, 48).view(2, 4, 6)
    got = computed(*tensors, text(traced_program(score_mod, mask_mod)), [], 0.5, grad_lse=grad_lse)
    assert_right(got, tensors, masked_by(score_mod, mask_mod), 0.5, grad_lse=grad_lse)


def test_scalars_and_operands_of_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_of(monkeypatch, 2, 2 * 4 * 7)
    tensors, random = inputs(2, 4, 2, 6, 7), torch.Generator().manual_seed(3)
    full = (2, 4, 6, 7)
    score, operands, factors = ir.SCORE * ir.scalar(0, F32), [], []
    for dims in ("b", "h", "q", "k", "bh", "bq", "hk", "bhq", "qk", "bhqk"):
        shape = [n if axis in dims else 1 for axis, n in zip("bhqk", full, strict=True)]
        factors.append(torch.randint(1, 3, shape, generator=random) / 2)
        score = (
            score * ir.operand(len(operands), F32, dims)
            if len(dims) < 2
            else score + ir.operand(len(operands), F32, dims)
        )
        operands.append(factors[-1])
    mask = make("ge", ir.index("q") + ir.scalar(0, I32), ir.index("k"))

    def masked(scores: torch.Tensor) -> torch.Tensor:
        modified = scores * 1.5
        for i, factor in enumerate(factors):
            modified = modified * factor if i < 4 else modified + factor
        return torch.where(torch.arange(6).view(-1, 1) + 2 >= torch.arange(7), modified, -math.inf)

    floats = [torch.tensor(1.5, dtype=torch.float64)]
    got = computed(*tensors, text(ir.program(score, mask)), operands, 0.5, ints=[2], floats=floats)
    assert_right(got, tensors, masked, 0.5)


@pytest.mark.parametrize("rows_at_once", [2, 100])
@pytest.mark.parametrize("dims", ["qk", "hqk", "bqk", "bhqk"])
@pytest.mark.parametrize("score_name", ["none", "softcap"])
def test_the_gradient_of_a_learned_operand(monkeypatch: pytest.MonkeyPatch, score_name, dims, rows_at_once) -> None:
    """Summed over what shares it, 0 where hidden; with a gradient of the log-sum-exp, too."""
    blocks_of(monkeypatch, rows_at_once, 2 * 4 * 7)
    tensors, random = inputs(2, 4, 2, 6, 7), torch.Generator().manual_seed(3)
    shape = [n if axis in dims else 1 for axis, n in zip("bhqk", (2, 4, 6, 7), strict=True)]
    bias = torch.randn(shape, generator=random)
    score_mod, mask_mod = SCORE_MODS[score_name], MASK_MODS["some rows see nothing"]
    plain = traced_program(score_mod, mask_mod)
    program = text(ir.program(with_bias(plain.score, ir.operand(0, F32, dims)), plain.mask))
    for grad_lse in (None, torch.linspace(-1, 1, 48).view(2, 4, 6)):
        leaf = bias.double().requires_grad_()

        def masked(scores, leaf=leaf):
            where = [torch.arange(n).view([-1 if i == d else 1 for i in range(4)]) for d, n in enumerate(scores.shape)]
            modified = scores if score_mod is None else score_mod(scores, *where)
            return torch.where(mask_mod(*where), modified + leaf.to(scores.dtype), -math.inf)

        *got, dbias = computed(*tensors, program, [bias], 0.5, grad_lse=grad_lse)
        assert_right(got, tensors, masked, 0.5, grad_lse=grad_lse)
        expected = reference(*tensors, masked, 0.5, torch.float64, grad_lse, more=(leaf,))[-1]
        torch.testing.assert_close(dbias.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_stock(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, h, 33, 16, generator=random).to(dtype) for h in (4, 2, 2, 4)]
    masked = masked_by(SCORE_MODS["softcap"], MASK_MODS["causal"])
    got = computed(*tensors, text(traced_program(SCORE_MODS["softcap"], MASK_MODS["causal"])), [], 0.25)
    exact = reference(*tensors, masked, 0.25, torch.float64)
    stock = reference(*tensors, masked, 0.25, dtype)
    assert got[0].dtype == dtype
    for mine, right, low in zip(got, exact, stock, strict=True):
        assert (mine.double() - right).norm() <= 2 * (low.double() - right).norm()


def test_no_columns() -> None:
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 0, 8)
    out, lse, dq, dk, _ = computed(query, key, key, query, text(ir.program()), [], 1.0)
    assert torch.equal(out, torch.zeros(1, 2, 3, 8))
    assert torch.equal(lse, torch.full((1, 2, 3), -math.inf))
    assert torch.equal(dq, torch.zeros(1, 2, 3, 8))
    assert dk.shape == key.shape


@pytest.mark.parametrize("learned", [False, True])
def test_sums_are_float32_whatever_torchs_default_is(learned):
    """As under torch.set_default_dtype(torch.bfloat16), which models of large weights are made with."""
    tensors, position = [t.bfloat16() for t in inputs(2, 4, 2, 24, 32)], ir.operand(0, F32, "hqk")
    given = text(ir.program(with_bias(ir.SCORE, position) if learned else ir.SCORE + position))
    operands = [torch.randn(1, 4, 24, 32, generator=torch.Generator().manual_seed(1))]
    found = [computed(*tensors, given, operands, 0.25)]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        stats = torch.full(tensors[0].shape[:3], math.nan, dtype=torch.float32)
        out, arguments = torch.empty_like(tensors[0]), Arguments(operands, (), (), given, 0.25)
        cpu.forward(*tensors[:3], arguments, out, stats)
        found.append([out, stats, *cpu.backward(tensors[3], None, *tensors[:3], out, stats, arguments)])
    finally:
        torch.set_default_dtype(default)
    for here, there in zip(*found, strict=True):
        assert here.dtype == there.dtype
        assert torch.equal(here, there)
