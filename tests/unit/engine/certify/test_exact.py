"""The derivative of a score_mod that certification compares with, and what getting it loads.

Knows nothing of plans.
"""

import subprocess
import sys

DERIVED = """
import sys
import torch
from torch.nn import functional as F
from cudnn_flex_compile.engine.certify.exact import masked_scores
from cudnn_flex_compile.engine.certify.reference import Sample

names = "abs neg reciprocal square exp exp2 log1p sqrt rsqrt sin cos tanh sigmoid erf relu floor ceil sign".split()
functions = [getattr(torch, name) for name in names] + [F.gelu, F.silu, F.softplus, F.logsigmoid]
functions += [lambda s: s.clamp(0.5, 2), lambda s: torch.minimum(s, s * 0.5), lambda s: s**3, lambda s: s + 1]
where = tuple(torch.zeros(1, dtype=torch.int64) for _ in range(2)) + (torch.arange(3), torch.arange(5))
for function in functions:
    scores = torch.linspace(0.1, 3, 15, dtype=torch.float64).view(1, 3, 5)
    masked, slope = masked_scores(Sample([], [], [], lambda s, *_: function(s)), scores, where)
    scores.requires_grad_()
    function(scores).sum().backward()
    torch.testing.assert_close((masked, slope), (function(scores).detach(), scores.grad))
print("torch._decomp.decompositions_for_jvp" in sys.modules)
"""


def test_a_derivative_takes_no_decompositions():
    """In a process of its own: what is loaded once stays."""
    done = subprocess.run([sys.executable, "-c", DERIVED], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
