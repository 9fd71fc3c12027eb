"""Generated calls through torch.compile, forward and backward: no further off than twice stock precision.

Knows nothing of how calls are generated (tests/support/generated.py) or judged (tests/fuzzing). Calls that are kept are
skipped. `python3 -m tests.measure.fuzz --generated 500 --workers 16` judges the same calls faster.
"""

import pytest
import torch

from cudnn_flex_compile import cache_clear
from cudnn_flex_compile.report.report import collect
from tests.fuzzing.judge import OPTIONS, judge
from tests.fuzzing.verdict import KEPT, RIGHT
from tests.support.generated import COUNT, call

SAMPLE, LEAST = 60, 0.6


@pytest.mark.parametrize("number", range(COUNT))
def test_within_twice_stock_error(number):
    case = call(number)
    verdict = judge(case)
    if verdict.kind == KEPT:
        pytest.skip(f"{number} kept: {verdict.reason}: {verdict.detail}")
    assert verdict.kind == RIGHT, f"{case}: {verdict}"


def test_most_calls_are_lowered():
    lowered = 0
    for number in range(SAMPLE):
        case = call(number)
        *qkv, _ = case.inputs("cuda")
        torch._dynamo.reset()
        cache_clear()
        with torch.no_grad(), collect() as report:
            torch.compile(case.attention("cuda"), backend="cudnn_flex", options=OPTIONS)(*qkv)
        lowered += not report.kept
    assert lowered >= LEAST * SAMPLE, f"only {lowered} of {SAMPLE}"
