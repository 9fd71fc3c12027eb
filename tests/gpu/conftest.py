"""Skips everything here without an NVIDIA GPU: numbers and speed are the GPU's to say."""

import pytest
import torch

from cudnn_flex_compile.passes.decide import cost_model
from tests.measure.measuring_lock import compiling, measuring_within


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(autouse=True)
def no_cache_folder(monkeypatch):
    """Tests count what is built, and judge what is built now."""
    monkeypatch.setenv("CUDNN_FLEX_CACHE", "0")


BESIDES = {"host": [0.0, 0.0], "host, LSE": [0.0], "mask": [0.0]}


@pytest.fixture(autouse=True)
def kernels_decide(monkeypatch):
    """Tests are small, and about what is lowered: the rest of a step counts for nothing, and nothing is measured."""
    monkeypatch.setenv("CUDNN_FLEX_TUNE_SECONDS", "0")
    for name, milliseconds in BESIDES.items():
        monkeypatch.setitem(cost_model.STEP, name, milliseconds)


@pytest.fixture(autouse=True, scope="session")
def nobody_measures():
    """Meanwhile, in another process."""
    with compiling() as file:
        yield file


@pytest.fixture
def alone(nobody_measures):
    """For what is about the whole device: the other processes of these tests have ended. (pytest -n)"""
    torch.cuda.synchronize()
    with measuring_within(nobody_measures):
        yield
