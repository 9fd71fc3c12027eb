"""Training on the CPU, where flex_attention itself refuses tensors that require grad; our ops do not.

Each process computes on one core: pytest-xdist runs one for each, and the tests' tensors are small.
"""

import collections
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for processes that tests start

import pytest
import torch
from torch.nn.attention import flex_attention

from cudnn_flex_compile.kernels import cpu


@pytest.fixture
def trainable(monkeypatch):
    """flex_attention takes tensors that require grad, in a fresh Dynamo."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def kernel_calls(monkeypatch):
    """How often the CPU kernels run: a Counter of "forward" and "backward"."""
    calls = collections.Counter()

    def counted(name, kernel):
        def run(*args):
            calls[name] += 1
            return kernel(*args)

        return run

    for name in ("forward", "backward"):
        monkeypatch.setattr(cpu, name, counted(name, getattr(cpu, name)))
    return calls
