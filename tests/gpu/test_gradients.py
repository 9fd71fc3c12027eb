"""Score_mods that stop gradients, and grad modes around calls, by certified plans: the gradients are autograd's."""

import pytest
import torch

from cudnn_flex_compile import cache_clear
from tests.support.gradients import differences


@pytest.mark.parametrize("number", range(75))
def test_gradients_are_those_of_autograd(number):
    torch._dynamo.reset()
    cache_clear()
    assert not differences(number, "cuda", lower="always")
