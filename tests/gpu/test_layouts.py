"""Unusual layouts on the GPU: plans return the strides that the fakes say, and Inductor's code, which asserts it, runs.

The cases are those of tests/compile/test_layouts.py and tests/unit/kernels/test_layouts.py.
"""

import pytest
import torch

from cudnn_flex_compile import cache_clear
from tests.compile.test_layouts import PAIRS, assert_right, generated, padded
from tests.unit.kernels import test_layouts as unit

DIRECT, COMPILED = 40, 24  # layouts
SIZES = {"rows": (64, 128), "columns": (64, 192), "dims": (64,)}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    cache_clear()
    yield
    cache_clear()


@pytest.mark.parametrize(("key", "value"), PAIRS)
def test_keys_and_values_with_gaps(key, value):
    assert_right(padded(key, value), "cuda", "inductor")


@pytest.mark.parametrize("seed", range(COMPILED))
def test_generated_layouts(seed):
    assert_right(generated(seed), "cuda", "inductor")


@pytest.mark.parametrize("name", unit.PROGRAMS)
def test_kernels_return_what_the_fakes_say(name):
    """Also of calls without a plan, which the fallback runs."""
    wrong = []
    for seed in range(DIRECT // len(unit.PROGRAMS)):
        given = unit.case(name, seed, SIZES)
        found = unit.by_ops(given, "cuda")
        wrong += [given] * (unit.layouts(found) != unit.layouts(unit.of_fakes(given)))
        unit.assert_near([t.cpu() for t in found], unit.by_ops(given), given)
    assert not wrong, f"{len(wrong)} of {DIRECT // len(unit.PROGRAMS)}: {wrong[:2]}"
