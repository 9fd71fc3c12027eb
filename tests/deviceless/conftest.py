"""Skips the deviceless tests where cuDNN is not installed; anything else that is missing fails.

It must not know what the tests build, nor whether the machine has a GPU.
"""

from importlib import metadata

import pytest

from .harness import CUDNN_WHEEL, load_libraries


@pytest.fixture(scope="session", autouse=True)
def cudnn_libraries() -> None:
    try:
        metadata.distribution(CUDNN_WHEEL)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{CUDNN_WHEEL} is not installed, and only it can judge a graph")
    load_libraries()
