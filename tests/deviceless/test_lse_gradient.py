"""Backwards that take a gradient of the log-sum-exp: the real cuDNN accepts them wherever it accepts those without, in
bfloat16; by row vectors, or by wider values, in float16.

Knows nothing of their numbers.
"""

import functools
import itertools
from dataclasses import replace

import pytest
import torch

from cudnn_flex_compile.bench.mods import causal
from cudnn_flex_compile.engine.graph.strategies import STRATEGIES
from cudnn_flex_compile.engine.guards import ends, guarded
from cudnn_flex_compile.engine.plans.widened_values import MORE
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, dense
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.scoremod import ir
from tests.deviceless import matrix

from .accepted import DIM, FEWER, LENGTHS, operand, problem, program_of, verdict
from .harness import SMS
from .test_lowerings import OPERANDS, SCORES

# One of each kind of backward: native, chained, parts, dense, biases, captured tensors along q, activations.
ONE_OF_EACH = (
    "full", "causal", "soft cap + window", "ALiBi + causal", "symmetric window", "any predicate", "documents",
    "block causal", "padded lengths", "causal + padding, right", "ReLU",
)  # fmt: skip
ROW_VECTORS = "Only 2 sq broadcasted vectors are supported"


def lowerings(program, lengths=LENGTHS):
    found = (strategy.lower(program, True, ends(lengths)) for strategy in STRATEGIES)
    return [lowering for lowering in found if not isinstance(lowering, Reason)]


def assert_accepted(program, operands=(), sms=(90,), lengths=LENGTHS, dtype=torch.bfloat16, head_dim=DIM):
    asked = problem(program, FORWARD, operands, lengths, dtype, head_dim).backward(lse_gradient=True)
    found = lowerings(program, lengths)
    assert found
    for lowering, sm in itertools.product(found, sms):
        refusal = verdict(asked, lowering, sm)
        assert refusal is None, f"SM{sm}, {lowering.strategy}: {refusal}"


def has_row_vectors(name):
    """Whether the score_mod of its backward reads a captured tensor along q: also a length of each batch entry."""
    return name == "padded lengths" or matrix.cell(name, FEWER[0], BACKWARD).text == "row vectors"


@functools.cache
def of_head_dim(name, dim, dtype=torch.float16):
    forward = matrix.problem(name)
    specs = {role: getattr(forward, role) for role in ("query", "key", "value", "out")}
    cut = {r: dense(replace(spec, shape=(*spec.shape[:3], dim), dtype=dtype)) for r, spec in specs.items()}
    return replace(forward, **cut).backward(lse_gradient=True)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_plan_takes_an_output_that_holds_the_gradient(name):
    for sm in SMS:
        plain, found = matrix.cell(name, sm, BACKWARD), matrix.judged(of_head_dim(name, 128, torch.bfloat16), sm)
        assert found.accepted == plain.accepted, f"SM{sm}: {found.text}"
        assert found.text == (f"{plain.text}, folded" if plain.accepted else plain.text), f"SM{sm}"


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_mods_on_every_architecture(name, dim):
    """By row vectors on SM90 and later, unless SM90 has too many of them. Wider values: where the plain backward is
    accepted, and on other architectures than SM90 up to 128 columns.
    """
    many = has_row_vectors(name)
    for sm in SMS:
        plain, found = matrix.cell(name, sm, BACKWARD), matrix.judged(of_head_dim(name, dim), sm)
        by_rows = sm not in FEWER and not (many and sm == 90)
        by_values = sm == 90 or dim + MORE <= 128
        assert found.accepted == (plain.accepted and (by_rows or by_values)), f"SM{sm}: {found.text}"
        if found.accepted:
            expected = plain.text.replace("native", "chained") if by_rows else f"{plain.text}, wider values"
            assert found.text == expected, f"SM{sm}"
        else:
            assert found.text in ("row vectors", "activation"), f"SM{sm}: {found.text}"


@pytest.mark.parametrize("sm", FEWER)
def test_row_vectors_are_why_it_is_refused(sm):
    """As soon as some cuDNN takes them there, calls are lowered there: nothing else has to be changed."""
    program = program_of(None, causal)
    asked = problem(program, FORWARD).backward(lse_gradient=True)
    for lowering in lowerings(program):
        assert ROW_VECTORS in verdict(asked, lowering, sm)


@pytest.mark.parametrize("name", SCORES)
def test_score_mods(name):
    assert_accepted(program_of(SCORES[name], causal), sms=(90, 100))


@pytest.mark.parametrize("name", OPERANDS)
def test_operands(name):
    program, given = OPERANDS[name]
    many = name in ("per batch and head", "lengths", "row starts")
    assert_accepted(program, (operand(*given),) if given else (), sms=(100,) if many else (90, 100))


@pytest.mark.parametrize("name", ["tanh", "silu", "negative", "where", "powers"])
def test_odd_lengths(name):
    lengths = (500, 1000)
    for program in (program_of(SCORES[name], causal), program_of(SCORES[name])):
        assert_accepted(program, lengths=lengths)
        assert_accepted(guarded(program, lengths), lengths=lengths)


def test_a_plain_score():
    for lengths in (LENGTHS, (500, 1000)):
        assert_accepted(ir.program(), lengths=lengths, sms=(90, 100))
        assert_accepted(guarded(ir.program(), lengths), lengths=lengths, sms=(90, 100))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_head_dims_and_dtypes(dtype, head_dim):
    assert_accepted(program_of(SCORES["tanh"], causal), dtype=dtype, head_dim=head_dim)
