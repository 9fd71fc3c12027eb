"""Paged attention's masks on the GPU: the same check as on the CPU (tests/compile/test_paged.py), with plans."""

import pytest

from tests.compile.test_paged import check
from tests.support.paged import NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [320, 1000])
def test_paged_masks(name, length):
    check(name, length, "cuda", {"lower": "always"})
