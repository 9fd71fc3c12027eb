"""When the host looks at numbers: at the end of the compiled graph, and what a look raises."""

import pytest
import torch

from cudnn_flex_compile.kernels.later import Reading, later, looking_last


def test_without_a_graph_it_looks_at_once() -> None:
    seen = []
    later(lambda: seen.append(1))
    assert seen == [1]


def test_in_a_graph_it_looks_last_and_in_order() -> None:
    seen = []

    def graph(name):
        later(lambda: seen.append(f"first look of {name}"))
        later(lambda: seen.append(f"second look of {name}"))
        seen.append(name)
        return name

    assert looking_last(graph)("a") == "a"
    assert seen == ["a", "first look of a", "second look of a"]
    later(lambda: seen.append("at once"))
    assert seen[-1] == "at once"


def test_a_graph_within_a_graph_looks_at_its_own() -> None:
    seen = []

    def inner():
        later(lambda: seen.append("inner"))

    def outer():
        later(lambda: seen.append("outer"))
        looking_last(inner)()
        seen.append("rest")

    looking_last(outer)()
    assert seen == ["inner", "rest", "outer"]


def test_what_a_look_raises_is_raised_and_a_failing_graph_looks_at_nothing() -> None:
    def refuse():
        raise RuntimeError("refused")

    with pytest.raises(RuntimeError, match="refused"):
        looking_last(lambda: later(refuse))()

    def fails():
        later(refuse)
        raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        looking_last(fails)()
    seen = []
    later(lambda: seen.append(1))
    assert seen == [1]


def test_reading_numbers_of_the_cpu() -> None:
    assert Reading(torch.tensor([1, 2]))() == [1, 2]
    assert Reading(torch.tensor(True))() is True
