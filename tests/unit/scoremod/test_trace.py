"""Tracing keeps the value: the traced expression equals the function itself, bit for bit, on every (b, h, q, kv)."""

import math

import pytest
import torch
from hypothesis import given, settings

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.aten import plain
from cudnn_flex_compile.scoremod.aten_table import Untraceable, dtype_of
from cudnn_flex_compile.scoremod.ir import BOOL, F32, I32, I64, SCORE
from cudnn_flex_compile.scoremod.optable import well_typed
from cudnn_flex_compile.scoremod.ranges import narrow
from cudnn_flex_compile.scoremod.simplify import simplify
from cudnn_flex_compile.scoremod.text import infix
from cudnn_flex_compile.scoremod.trace import Captured, trace
from tests.support.evaluate import CPU, differing, direct, interpreted, scores, traced
from tests.support.generate import Grammar, Mod, mask_mods, score_mods

WILD = Grammar(smooth=False, pairs=True)


def assert_same(mod: Mod, score: torch.Tensor) -> None:
    expected, expression = direct(mod, score if mod.takes_score else None), traced(mod)
    for form in (expression, narrow(expression)):
        assert differing(interpreted(form, score), expected) == 0, infix(form)
        assert all(well_typed(n.kind, n.dtype, n.args) for n in ir.walk(form) if n.args), infix(form)


@settings(max_examples=250)
@given(score_mods(WILD))
def test_score_mods_keep_their_value(mod: Mod) -> None:
    assert_same(mod, scores())


@settings(max_examples=250)
@given(mask_mods(Grammar(pairs=True)))
def test_mask_mods_keep_their_value(mod: Mod) -> None:
    assert_same(mod, scores())


@pytest.mark.parametrize(
    "source",
    [
        "((q >= kv) * 2**30) * 4 > 2**31",  # a bool times an integer is an int64
        "((q >= kv) + (kv >= q)) == 2",  # a bool plus a bool is a bool
        "(u8[kv].to(torch.int32) - 3) >= -1",
        "u8[kv] < 3",
        "(u8[kv] - i0) >= -1",  # promoted to int64 by a 0-d tensor
        "u8[q] == u8[kv]",
        "torch.where(u8[kv] > 1, q, kv) >= 2",
        "q.to(torch.int64) * 2**40 >= kv.to(torch.int64) * 2**40",
        "(q + (-(2**31))) < 0",
        "q + (2**31 - 1) >= kv",
        "(half[h] > 0) & (q >= kv)",
        "torch.maximum(q >= kv, kv >= 3)",
        "(q % 2 == 1)",
        "torch.logical_not(q - kv)",
        "torch.tensor(True) & (q >= kv)",
        "torch.ones_like(q, dtype=torch.bool)",
        "q.new_zeros((), dtype=torch.bool) | (kv < 3)",
        "(q - kv).bool() ^ (kv == 3)",
        "~(q == kv)",
        "(table[h, q - kv + 6] > 0) & (table[h, kv] < 0.5)",
        "fk[q] > fk[kv]",
        "ik[ik[kv]] == ik[q]",
        "fh[0] > fk[kv]",
        "(q.float() / 3 >= kv) & (q / 2 > kv / 3)",
        "(q & 1) == (kv & 1)",
        "(q ^ kv) <= 3",
        "(q | kv) == 7",
        "(~q) > kv - 4",
        "((q - kv) & -4) == -4",
        "((q - kv) & 6) == 2",
        "((q - kv) ^ -1) > 0",
        "(-kv - 1 | 4) >= -3",
        "(1 & q) > 0",
        "(2 | q) == 3",
        "(3 ^ q) > kv",
        "((q & kv) | (q ^ kv)) == (q | kv)",
        "(q >> 1) == (kv >> 1)",
        "((q - kv) >> 1) >= -1",
        "(kv << 2) > q * 3",
        "(1 << kv) > q + 8",
        "((q - kv) >> q) == 0",
        "((kv - q) >> (q - kv)) >= 0",
        "((q - 2) << (kv - 3)) > 4",
        "(q << 31) != 0",
        "(q << 32) == 0",
        "((q - kv) >> 31) == -1",
        "((q - kv) >> 32) == -1",
        "((q - kv) >> -1) == -1",
        "(q.to(torch.int64) << 40) > (kv.to(torch.int64) << 39)",
        "((q - kv).to(torch.int64) >> 63) == 0",
        "(q.to(torch.int64) << 64) == 0",
        "torch.bitwise_right_shift(5 - q, kv) > 1",
        "torch.bitwise_left_shift(q, 2) > kv",
        "((q >= kv) & (kv >= 2)) ^ (q == 3)",
        "((q >= kv) & 3) == (kv & 1)",
        "(ik[q] & ik[kv]) != 0",
        "((ik[kv] << i0) | ik[q]) == 16",
        "(u8[kv] & u8[q]) != 0",
        "(u8[kv] & 2 | 1 ^ u8[q]) == 3",
    ],
)
def test_masks_that_are_easily_got_wrong(source: str) -> None:
    assert_same(Mod(f"({source})", False), scores())


@pytest.mark.parametrize(
    "source",
    [
        "score + torch.full((), 0.1, dtype=torch.bfloat16)",
        "score * torch.tensor(0.1)",
        "score + torch.scalar_tensor(2)",
        "torch.where(q >= kv, 1, 0) * score",
        "torch.where(q >= kv, 1.5, -0.25) + score",
        "score.masked_fill(q < kv, -inf)",
        "score.float().clone().detach().contiguous()",
        "torch.clamp(q - kv, 0.5, 2.5) * score",
        "torch.clamp(score, 2.0, -1.0)",
        "score * (q >= kv)",
        "score + half[h] + half[h].float()",
        "torch.rsub(score, 2)",
        "score / 0",
        "1 / (score * 0)",
        "torch.nn.functional.softplus(score * 30)",
        "score.new_full((), 2.5) * score",
        "torch.pow(score, 1)",
        "torch.tanh(score / 2) * torch.tensor(3)",
        "f0",
        "score * 0 + i0",
        "score + fbk[b][kv]",
        "score + table[h][q - kv + 6]",
        "score + table[0][kv] + table[-1, q] + table[1][-2]",
        "score + fbk.T[kv, b] + fbk.t()[kv][b] + fbk.transpose(0, 1)[kv, b] + fbk.permute(1, 0)[kv][b]",
        "score + fbk.unsqueeze(1)[b][0][kv] + fbk[None][0, b, kv] + fbk.unsqueeze(0).squeeze(0)[b][kv]",
        "score + fbk.select(0, 1)[kv] + fbk.select(-1, -1)[b]",
    ],
)
def test_scores_that_are_easily_got_wrong(source: str) -> None:
    assert_same(Mod(f"({source})", True), scores())


@pytest.mark.parametrize(
    ("source", "op"),
    [
        ("score.int().float()", "cast from float"), ("score.to(torch.bfloat16).float()", "cast"),
        ("score.double()", "float64"),
        ("score % 2", "remainder"), ("score // 2", "floor_divide"), ("torch.fmod(score, 2.0)", "fmod"),
        ("torch.lgamma(score)", "lgamma"), ("score ** score", "pow"), ("2 ** score", "pow"),
        ("torch.round(score)", "round"),
        ("score.clamp(min=score * 2)", "clamp"), ("score + fh.sum()", "sum"), ("score + fbk[b].sum()", "vector"),
        ("score + fbk[:, kv][b]", "make_fx"), ("score + table[h][ik].sum()", "vector"),
        ("torch.nn.functional.softplus(score, beta=2)", "softplus"), ("torch.rand(()) + score", "rand"),
        ("torch.nn.functional.logsigmoid(score)", "log_sigmoid"),  # an op of two results
        ("torch.relu(q - kv) + score", "relu"), ("torch.sign(q - kv) + score", "sign"),
        ("score.to(torch.float16)", "float16"),
        ("torch.div(score, 2.0, rounding_mode='floor')", "div"),
        ("torch.div(q, 2, rounding_mode='trunc') + score", "div"),
        ("(q ** 2) * score", "pow"), ("q - kv", "dtype"), ("q >= kv", "dtype"),
        ("fh[h].to(torch.float64) + score", "float64"),
    ],
)  # fmt: skip
def test_untraceable_scores(source: str, op: str) -> None:
    with pytest.raises(Untraceable, match=op):
        traced(Mod(source, True))


@pytest.mark.parametrize(
    ("source", "op"),
    [
        ("q < 2**31", "beyond"), ("q + 2**31 > kv", "beyond"), ("q >= -2**31 - 1", "beyond"), ("kv == 2**32", "beyond"),
        ("u8[kv] > -1", "beyond"), ("u8[kv] < 300", "beyond"), ("(u8[q] - u8[kv]) >= 0", "uint8"),
        ("u8[kv] + 1 > 0", "uint8"),
        ("q.to(torch.uint8) >= 3", "uint8"), ("kv.to(torch.int16) > q", "int16"),
        ("(u8[kv] << 1) > 3", "uint8"), ("(~u8[kv]) > 3", "uint8"),
        ("-u8[kv] > 3", "uint8"),
        ("q - kv", "dtype"),
        ("torch.isin(q, ik)", "dimensions|isin|any"),
    ],
)  # fmt: skip
def test_untraceable_masks(source: str, op: str) -> None:
    with pytest.raises(Untraceable, match=op):
        traced(Mod(source, False))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.uint16])
def test_captured_dtypes_that_have_no_expression(dtype: torch.dtype) -> None:
    with pytest.raises(Untraceable, match=str(dtype)):
        dtype_of(dtype)


def test_the_dtype_of_the_result() -> None:
    leaves = [Captured(None, ir.scalar(0, I32)), Captured(torch.tensor(0.5), ir.scalar(0, F32))]
    score = trace(lambda s, b, h, q, kv, n, x: s * x + (q - n), True, leaves, CPU)
    assert infix(score) == "(score * scalar0) + (q - scalar0)"
    assert score.dtype == F32
    assert trace(lambda b, h, q, kv, n, x: (q - kv <= n) & (x > 0), False, leaves, CPU).dtype == BOOL


def test_symbolic_integers_are_32_bit() -> None:
    mask = trace(lambda b, h, q, kv, n: q - kv <= n, False, [Captured(None, ir.scalar(0, I32))], CPU)
    assert all(node.dtype in (I32, BOOL) for node in ir.walk(mask))
    with pytest.raises(Untraceable):
        traced(Mod("q - 2**40 > kv", False))
    assert narrow(traced(Mod("q.long() - 2**40 > kv", False))).args[0].dtype == I64


def test_items_are_read_as_the_captured_number() -> None:
    class WithItem(torch.nn.Module):
        def forward(self, score, b, h, q, kv, cap):
            return torch.tanh(score / cap.item()) * cap.item()

    graph = torch.fx.Graph()
    score, *_, cap = (graph.placeholder(name) for name in ("score", "b", "h", "q", "kv", "cap"))
    number = graph.call_method("item", (cap,))
    graph.output(graph.call_function(torch.mul, (graph.call_function(torch.tanh, (score,)), number)))
    module = torch.fx.GraphModule(WithItem(), graph)
    root = trace(module, True, [Captured(torch.tensor(2.0), ir.scalar(0, F32))], CPU)
    assert infix(root) == "tanh(score) * scalar0"
    assert "item" in module.code, "the user's own graph is not touched"
    function = plain(lambda score: score)
    assert function(3) == 3


def test_the_identity_and_constants() -> None:
    assert traced(Mod("score", True)) is SCORE
    assert simplify(traced(Mod("torch.full_like(score, -inf)", True))) is ir.const(-math.inf, F32)
    assert simplify(traced(Mod("torch.ones((), dtype=torch.bool)", False))) is ir.TRUE
