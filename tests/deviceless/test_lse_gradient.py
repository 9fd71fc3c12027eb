"""Backwards that take a gradient of the log-sum-exp: the real cuDNN accepts them wherever it accepts those without.

Knows nothing of their numbers.
"""

import functools
from dataclasses import replace

import pytest

from cudnn_flex_compile.engine.problem import BACKWARD, dense
from tests.deviceless import matrix

from .harness import SMS

# One of each kind of backward: native, chained, parts, dense, biases, captured tensors along q, activations.
ONE_OF_EACH = (
    "full", "causal", "soft cap + window", "ALiBi + causal", "symmetric window", "any predicate", "documents",
    "block causal", "padded lengths", "causal + padding, right", "ReLU",
)  # fmt: skip

@functools.cache
def of_head_dim(name, dim):
    forward = matrix.problem(name)
    specs = {role: getattr(forward, role) for role in ("query", "key", "value", "out")}
    cut = {r: dense(replace(spec, shape=(*spec.shape[:3], dim))) for r, spec in specs.items()}
    return replace(forward, **cut).backward(lse_gradient=True)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_plan_takes_an_output_that_holds_the_gradient(name):
    for sm in SMS:
        plain, found = matrix.cell(name, sm, BACKWARD), matrix.judged(of_head_dim(name, 128), sm)
        assert found.accepted == plain.accepted, f"SM{sm}: {found.text}"
        assert found.text == (f"{plain.text}, folded" if plain.accepted else plain.text), f"SM{sm}"
