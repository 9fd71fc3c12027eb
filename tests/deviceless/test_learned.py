"""Biases that take a gradient: the real cuDNN accepts them, with and beside masks and score_mods, everywhere.

Knows nothing of their numbers.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from cudnn_flex_compile.bench.mods import causal, softcap
from cudnn_flex_compile.engine.guards import guarded
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32
from cudnn_flex_compile.scoremod.learned import with_bias
from tests.deviceless import matrix

from .accepted import lowerings, operand, problem, program_of, verdict
from .harness import SMS

MASKS = {
    "none": None,
    "causal": causal,
    "window": lambda b, h, q, k: (q >= k) & (q - k < 64),
    "behind": lambda b, h, q, k: q - k < 64,
    "symmetric": lambda b, h, q, k: (q - k).abs() <= 64,
    "shifted": lambda b, h, q, k: q + 8 >= k,
    "shifted back": lambda b, h, q, k: q - 8 >= k,
    "prefix": lambda b, h, q, k: (q >= k) | (k < 100),
    "dilated": lambda b, h, q, k: (q - k) % 3 == 0,
}
NATIVE = {"none", "causal", "window", "behind", "symmetric", "shifted"}
SCORES = {
    "soft cap": softcap(20.0),
    "scale": lambda s, b, h, q, k: s * 0.5,
    "where": lambda s, b, h, q, k: torch.where(q >= k, s, s * 0.5),
    "absolute": lambda s, b, h, q, k: s.abs(),
    "squared": lambda s, b, h, q, k: s * s,
    "exp": lambda s, b, h, q, k: torch.exp(s * 0.1) - s,
    "indices": lambda s, b, h, q, k: s + k * b * 0.1,
}
SHARED = ("qk", "hqk", "bqk", "bhqk")


def learned(dims, score_mod=None, mask_mod=None):
    program = program_of(score_mod, mask_mod)
    return ir.program(with_bias(program.score, ir.operand(0, F32, dims)), program.mask)


def assert_accepted(program, given, sms=SMS, **how):
    found = lowerings(program)
    assert found
    for sm, lowering, direction in itertools.product(sms, found, (FORWARD, BACKWARD)):
        refusal = verdict(problem(program, direction, (given,), **how), lowering, sm)
        assert refusal is None, f"SM{sm}, {lowering.strategy}, {direction}: {refusal}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_on_every_architecture(mask, dtype):
    program = learned("hqk", None, MASKS[mask])
    assert ("native" in [lowering.strategy for lowering in lowerings(program)]) == (mask in NATIVE)
    assert_accepted(program, operand("hqk", dtype))


@pytest.mark.parametrize("dims", SHARED)
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_what_shares_a_bias(mask, dims):
    for score_mod in (None, softcap(20.0)):
        assert_accepted(learned(dims, score_mod, MASKS[mask]), operand(dims, torch.float32), sms=(80, 90, 100))


@pytest.mark.parametrize("mask", ["none", "causal", "symmetric", "dilated"])
@pytest.mark.parametrize("score", SCORES)
def test_behind_a_score_mod(score, mask):
    """The backward of any: its first node multiplies, or cuDNN refuses it beside dBias."""
    assert_accepted(learned("hqk", SCORES[score], MASKS[mask]), operand("hqk", torch.float32), sms=(80, 90, 100))


@pytest.mark.parametrize("mask", sorted(NATIVE))
def test_with_a_gradient_of_the_log_sum_exp(mask):
    """By an output that holds it: where no such gradient is asked for, cuDNN takes the same graph."""
    program = learned("hqk", None, MASKS[mask])
    asked = problem(program, BACKWARD, (operand("hqk", torch.float32),))
    for sm in SMS:
        assert matrix.judged(asked, sm) == matrix.Cell("native", True)
        assert matrix.judged(replace(asked, lse_gradient=True), sm) == matrix.Cell("native, folded", True)


def test_activations_are_sm90s():
    program = learned("hqk", lambda s, b, h, q, k: torch.nn.functional.silu(s), causal)
    assert_accepted(program, operand("hqk", torch.float32), sms=(90,))


@pytest.mark.parametrize("lengths", [(49, 49), (500, 1000), (1000, 500), (64, 4096), (1, 640)])
def test_odd_lengths(lengths):
    given = operand("hqk", torch.float32, lengths)
    for program in (learned("hqk"), learned("hqk", None, causal), learned("hqk", softcap(20.0), causal)):
        assert_accepted(program, given, sms=(80, 90, 100), lengths=lengths)
        assert_accepted(guarded(program, lengths), given, sms=(80, 90, 100), lengths=lengths)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_head_dims_and_dtypes(head_dim, dtype):
    for stored in (torch.float32, dtype):
        assert_accepted(learned("hqk", None, causal), operand("hqk", stored), dtype=dtype, head_dim=head_dim)


def test_a_gradient_has_16_bits_whatever_the_bias_has(monkeypatch):
    """cuDNN reduces to nothing wider: if one does some day, gradients of float32 biases should be float32."""
    from cudnn_flex_compile.engine.graph import build

    program = learned("hqk", None, causal)
    asked = problem(program, BACKWARD, (operand("hqk", torch.float32),))
    plain = build.output_specs
    wide = lambda p: (*plain(p)[:3], operand("hqk", torch.float32))  # noqa: E731
    monkeypatch.setattr(build, "output_specs", wide)
    assert "should be fp16/bf16" in verdict(asked, lowerings(program)[0], 90)
