"""Paged attention's masks are lowered, forward and backward, and no further off than twice stock precision."""

import pytest
import torch

from cudnn_flex_compile.report.report import collect
from tests.support import gym
from tests.support.paged import NAMES, cases

OPTIONS = {"inner_backend": "aot_eager", "lower": "always"}


def check(name, length, device, options):
    """Compiles the call, and compares the output and the gradients of queries, keys and values."""
    case = cases(length, device)[name]
    *qkv, grad = gym.inputs(case, device)
    leaves = [t.requires_grad_() for t in qkv]
    torch._dynamo.reset()
    with collect() as report:
        out = torch.compile(gym.call_of(case, device), backend="cudnn_flex", options=options, fullgraph=True)(*leaves)
    (call,) = report.calls
    assert call.reason is None, str(call.reason)
    found = (out.detach(), *torch.autograd.grad(out, leaves, grad))
    exact, stock = (gym.reference(case, *qkv, grad, exact=e) for e in (True, False))
    for f, e, s in zip(found, (exact[0], *exact[2:]), (stock[0], *stock[2:]), strict=True):
        assert bool(f.isfinite().all())
        assert (f - e).norm() <= 2 * (s - e).norm()


@pytest.mark.parametrize("name", NAMES)
def test_paged_masks(name, trainable):
    check(name, 192, "cpu", OPTIONS)
