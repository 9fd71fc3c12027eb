"""attn-gym's masks and mods through torch.compile, forward and backward: no further off than twice stock precision.

Knows nothing of which are lowered: those that are kept run on Inductor, by the same rule, where it can run them.
"""

import pytest
import torch

from cudnn_flex_compile.reasons import Code
from cudnn_flex_compile.report.report import collect
from tests.gpu.test_numerics import NAMES, poison
from tests.support import gym
from tests.support.gym import CASES


def refused_by_stock(call, leaves):
    """Inductor's error for the same call, or None: it has no kernel for a score_mod with torch.dot, for one."""
    torch._dynamo.reset()
    try:
        torch.compile(call)(*leaves)
    except Exception as error:
        return str(error)
    return None


def run(call, leaves):
    """The output and what was done with the call."""
    torch._dynamo.reset()
    with collect() as report:
        try:
            out = torch.compile(call, backend="cudnn_flex", options={"lower": "always"}, fullgraph=True)(*leaves)
        except Exception:
            refused = refused_by_stock(call, leaves) if report.kept else None
            if refused is None:
                raise
            pytest.skip(f"kept ({report.kept[0].reason}), and Inductor refuses it: {refused.splitlines()[0]}")
    (only,) = report.calls
    return out, only


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", [320, 1000])
def test_within_twice_stock_error(name, length):
    case = CASES[name](length, "cuda")
    *qkv, grad = gym.inputs(case, "cuda")
    leaves = [t.requires_grad_() for t in qkv]
    call = gym.call_of(case, "cuda")
    poison()
    out, report = run(call, leaves)
    assert report.reason is None or report.reason.code is not Code.INTERNAL, str(report.reason)
    poison()
    found = (out.detach(), None, *torch.autograd.grad(out, leaves, grad))
    exact, stock = (gym.reference(case, *qkv, grad, exact=e) for e in (True, False))
    for label, f, e, s in zip(NAMES, found, exact, stock, strict=True):
        if f is None:
            continue
        assert bool(f.isfinite().all()), label
        error, allowed = (f - e).norm(), 2 * (s - e).norm()
        verdict = report.reason or report.strategies
        assert error <= allowed, f"{label}: {error / e.norm():.2e}, stock {allowed / 2 / e.norm():.2e}, {verdict}"
