"""Forward graphs that have the largest score of each row as an output, too, which the package does not ask for.

Knows nothing of whether cuDNN takes them, or of their numbers.
"""

import contextlib

import torch

from cudnn_flex_compile.engine.graph import build
from cudnn_flex_compile.engine.problem import stats_spec

BOTH_FROM = 92100  # before, a graph has the largest score and a sum in place of the log-sum-exp (frontend 1.32)
ROLE = "score_max"


def soft_cap(score, b, h, q, kv):
    return torch.tanh(score / 20) * 20


def causal(b, h, q, kv):
    return q >= kv


PROGRAMS = {
    "plain": (None, None),
    "causal": (None, causal),
    "causal window": (None, lambda b, h, q, kv: (q >= kv) & (q - kv <= 100)),
    "band": (None, lambda b, h, q, kv: (q - kv <= 50) & (kv - q <= 20)),
    "soft cap": (soft_cap, None),
    "soft cap, causal": (soft_cap, causal),
    "negative scores, causal": (lambda score, b, h, q, kv: score - 100, causal),
    "prefix": (None, lambda b, h, q, kv: (q >= kv) | (kv < 64)),
    "rows that see nothing": (None, lambda b, h, q, kv: kv - q >= 100),
}


class _Asking:
    """A graph whose attention node has one more output."""

    def __init__(self, graph, more):
        self._graph, self._more = graph, more

    def __getattr__(self, name):
        return getattr(self._graph, name)

    def sdpa(self, **given):
        return self._graph.sdpa(**given, **self._more)


@contextlib.contextmanager
def with_maximum():
    """Forward graphs built within have the output, by the role ROLE."""
    before = build._forward

    def forward(graph, problem, callbacks, roles):
        spec = stats_spec(problem)
        roles[ROLE] = build._output(build._declare(graph, spec), spec)
        before(_Asking(graph, {ROLE: roles[ROLE]}), problem, callbacks, roles)

    build._forward = forward
    try:
        yield
    finally:
        build._forward = before
