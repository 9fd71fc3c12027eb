"""Generated calls through torch.compile, forward and backward: no further off than twice stock precision.

Knows nothing of how calls are generated or judged (tests/generated.py). Calls that are kept are skipped.
"""

import math

import pytest
import torch

from cudnn_flex_compile import cache_clear
from cudnn_flex_compile.report import collect
from tests.generated import COUNT, call, too_far

OPTIONS = {"inner_backend": "aot_eager", "lower": "always"}
SAMPLE, LEAST = 60, 0.6


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    cache_clear()


def poison():
    """Leaves NaN in the allocator's free memory, of large and of small blocks, so that an unwritten output shows."""
    blocks = [torch.full((n,), math.nan, device="cuda") for n in (2**24, *[2**17] * 32, *[2**12] * 32)]
    del blocks


def compiled(attention):
    return torch.compile(attention, backend="cudnn_flex", options=OPTIONS)


@pytest.mark.parametrize("number", range(COUNT))
def test_within_twice_stock_error(number):
    case = call(number)
    *qkv, grad = case.inputs("cuda")
    leaves = [t.requires_grad_() for t in qkv]
    attention = compiled(case.attention("cuda"))
    poison()
    with collect() as report:
        out = attention(*leaves)
    if report.kept:
        pytest.skip(f"{number} kept: {report.kept[0].reason}")
    poison()
    gradients = torch.autograd.grad(out, leaves, grad)
    wrong = too_far(case, (out.detach(), *gradients), [t.detach() for t in qkv], grad)
    assert not wrong, f"{case}: {wrong}"


def test_most_calls_are_lowered():
    lowered = 0
    for number in range(SAMPLE):
        case = call(number)
        *qkv, _ = case.inputs("cuda")
        torch._dynamo.reset()
        with torch.no_grad(), collect() as report:
            compiled(case.attention("cuda"))(*qkv)
        lowered += not report.kept
    assert lowered >= LEAST * SAMPLE, f"only {lowered} of {SAMPLE}"
