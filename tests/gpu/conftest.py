"""Skips everything here without an NVIDIA GPU: numbers and speed are the GPU's to say."""

import math

import pytest
import torch

from cudnn_flex_compile.passes.decide import keep_rules
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


NONE = -math.inf
RULES = {
    "MIN_SAVING_MS": {False: NONE, True: NONE}, "MIN_SAVING_WITH_LSE_MS": NONE, "MIN_MASK_SHARE": NONE,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_rules_by_size(monkeypatch):
    """Tests are small, and about what is lowered."""
    for name, value in RULES.items():
        monkeypatch.setattr(keep_rules, name, value)


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
