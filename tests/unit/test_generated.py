"""The generated calls that the GPU is tested with are calls that stock flex_attention takes and the reference agrees.

Knows nothing of the package under test.
"""

import pytest
import torch

from tests.support.generated import COUNT, call, too_far


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("number", range(50))
def test_eager_flex_attention_agrees(number: int) -> None:
    case = call(number)
    *qkv, grad = case.inputs("cpu")
    with torch.no_grad():
        out = case.attention("cpu")(*qkv)
    assert not too_far(case, (out,), qkv, grad), case


@pytest.mark.parametrize("number", range(0, 50, 5))
def test_stock_precision_is_within_its_own_bound(number: int) -> None:
    case = call(number)
    *qkv, grad = case.inputs("cpu")
    out, _, *gradients = case.reference(qkv, grad, exact=False)
    assert not too_far(case, (out, *gradients), qkv, grad), case
    assert not any(bool(t.isnan().any()) for t in (out, *gradients))


def test_a_number_is_a_call() -> None:
    assert call(7) == call(7)
    assert len({(c.score, c.mask) for c in map(call, range(COUNT))}) > 0.9 * COUNT
