"""A compiled function takes whatever comes, where Dynamo would give up. Nothing here computes attention."""

import pytest
import torch

from cudnn_flex_compile.kernels import inductor
from cudnn_flex_compile.kernels.recompiling import Recompiling


def double(x):
    return x * 2


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Two compilations of one piece of code, and by a backend that does nothing."""
    torch._dynamo.reset()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile(f, backend="eager", **how))
    with torch._dynamo.config.patch(recompile_limit=2):
        yield


def test_more_kinds_of_inputs_than_dynamo_compiles_for():
    function = Recompiling(double, "")
    for _ in range(2):
        for rank in range(1, 7):
            x = torch.randn([2] * rank)
            assert torch.equal(function(x), x * 2)


def test_dynamo_alone_gives_up():
    function = torch.compile(double, fullgraph=True)
    function(torch.randn(2))
    function(torch.randn(2, 2))
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        function(torch.randn(2, 2, 2))


def test_sizes_that_change_are_compiled_for_once_more():
    function, graphs = Recompiling(double, ""), torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for length in range(3, 40):
        function(torch.randn(length))
    assert graphs["unique_graphs"] - before == 2


def test_programs_have_kernels_of_their_own():
    inductor._compiled.cache_clear()
    first, second = inductor._compiled("one"), inductor._compiled("another")
    assert first is inductor._compiled("one")
    assert first is not second
    for number in range(inductor.PROGRAMS):
        inductor._compiled(f"program {number}")
    assert inductor._compiled.cache_info().currsize == inductor.PROGRAMS
    assert inductor._compiled("one") is not first, "the least recently used went"
    inductor._compiled.cache_clear()
