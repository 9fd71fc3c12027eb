"""Training on the CPU, where flex_attention itself refuses tensors that require grad; our ops do not.

Each process computes on one core: pytest-xdist runs one for each, and the tests' tensors are small.
"""

import collections
import gc
import logging
import os

# Before torch is imported, and for processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # the core has what it says; else Inductor compiles to find out

import pytest
import torch
import torch._dynamo.config
from torch.nn.attention import flex_attention

from cudnn_flex_compile import settings
from cudnn_flex_compile.kernels import cpu

# Eager flex_attention, with which tests compare, has Dynamo trace it at each call; without, it computes the same.
flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = not torch.cuda.is_available()
torch._dynamo.config.run_gc_after_compile = False
# pytest adds a handler to loggers that don't propagate, and to have one handle its records torch writes all graphs.
TRACE = logging.getLogger("torch.__trace")
TRACE.propagate = True
TRACE.handlers.clear()


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="run each Nth case of each parametrized test")


def pytest_collection_modifyitems(config, items):
    every, seen, left_out = config.getoption("every"), collections.Counter(), []
    for item in list(items):
        test = item.nodeid.partition("[")[0]
        if seen[test] % every:
            items.remove(item)
            left_out.append(item)
        seen[test] += 1
    config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A process that has run its tests takes some of another's, so that none waits; tests of a file stay together."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


def pytest_collection_finish():
    """What is there now stays until the end: the garbage collector, which Dynamo keeps busy, need not look at it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(autouse=True)
def settings_of_its_own():
    """Each test reads the process's settings anew."""
    yield
    settings.forget()


@pytest.fixture
def trainable(monkeypatch):
    """flex_attention takes tensors that require grad, in a fresh Dynamo."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)  # else no captured gradients
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
