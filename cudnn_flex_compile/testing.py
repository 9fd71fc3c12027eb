"""A pytest fixture for tests of models: the report of everything that was compiled during a test.

In a conftest.py:

    pytest_plugins = ["cudnn_flex_compile.testing"]

and then in a test:

    def test_my_model(flex_report):
        torch.compile(model, backend="cudnn_flex")(*inputs)
        flex_report.assert_all_lowered()
        flex_report.assert_plans_built(at_most=2)
        flex_report.assert_no_recompiles()

The fixture listens to this process alone, and from the start of the test on; torch's and our caches are as the tests
before left them, so reset them (torch._dynamo.reset(), cudnn_flex_compile.cache_clear()) where a count depends on it.
It is no entry point of pytest: every test session on the machine would then import torch.
"""

from collections.abc import Generator

import pytest

from cudnn_flex_compile.report.report import Report, collect

__all__ = ["Report", "collect", "flex_report"]


@pytest.fixture
def flex_report() -> Generator[Report]:
    """The report of all graphs that are compiled during the test."""
    with collect() as report:
        yield report
