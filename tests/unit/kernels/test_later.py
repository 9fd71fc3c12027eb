"""When the host looks at numbers: at the end of the compiled graph, and what a look raises."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from cudnn_flex_compile.kernels.later import MOST, Reading, later, looking_last

READY, NOT_YET = (lambda: True), (lambda: False)


def test_without_a_graph_it_looks_at_once() -> None:
    seen = []
    later(lambda: seen.append(1), READY)
    assert seen == [1]


def test_in_a_graph_it_looks_last_and_in_order() -> None:
    seen = []

    def graph(name):
        later(lambda: seen.append(f"first look of {name}"), READY)
        later(lambda: seen.append(f"second look of {name}"), READY)
        seen.append(name)
        return name

    assert looking_last(graph)("a") == "a"
    assert seen == ["a", "first look of a", "second look of a"]
    later(lambda: seen.append("at once"), READY)
    assert seen[-1] == "at once"


def test_a_graph_within_a_graph_looks_at_its_own() -> None:
    seen = []

    def inner():
        later(lambda: seen.append("inner"), READY)

    def outer():
        later(lambda: seen.append("outer"), READY)
        looking_last(inner)()
        seen.append("rest")

    looking_last(outer)()
    assert seen == ["inner", "rest", "outer"]


def refuse():
    raise RuntimeError("refused")


def test_what_a_look_raises_is_raised() -> None:
    with pytest.raises(RuntimeError, match="refused"):
        looking_last(lambda: later(refuse, READY))()


def test_what_a_failing_graph_left_to_look_at_the_next_graph_looks_at() -> None:
    def fails():
        later(refuse, READY)
        raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        looking_last(fails)()
    with pytest.raises(RuntimeError, match="refused"):
        looking_last(lambda: 1)()
    seen = []
    later(lambda: seen.append(1), READY)
    assert seen == [1]


def test_reading_numbers_of_the_cpu() -> None:
    assert Reading(torch.tensor([1, 2]))() == [1, 2]
    assert Reading(torch.tensor(True))() is True


class Graph(torch.autograd.Function):
    """A graph that has something to look at, and a backward."""

    @staticmethod
    def forward(ctx, x, look, ready):
        later(look, ready)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def differentiable(look, ready=NOT_YET):
    return torch.ones(2, requires_grad=True), looking_last(lambda x: (Graph.apply(x, look, ready),))


def test_where_a_gradient_may_follow_it_looks_at_the_end_of_the_backward() -> None:
    seen = []
    x, run = differentiable(lambda: seen.append("look"))
    y = x * 2
    y.register_hook(lambda g: seen.append("before the graph"))
    (out,) = run(y)
    assert seen == []
    out.sum().backward()
    assert seen == ["before the graph", "look"]
    with torch.no_grad():
        run(x)
    assert seen.pop() == "look"


def test_what_is_there_is_looked_at_all_the_same() -> None:
    x, run = differentiable(refuse, READY)
    with pytest.raises(RuntimeError, match="refused"):
        run(x)


def test_what_it_raises_then_the_backward_raises() -> None:
    x, run = differentiable(refuse)
    (out,) = run(x)
    with pytest.raises(RuntimeError, match="refused"):
        out.sum().backward()
    looking_last(lambda: 1)()  # nothing is left to look at


def test_without_a_backward_a_later_graph_looks() -> None:
    x, run = differentiable(refuse)
    run(x)
    with pytest.raises(RuntimeError, match="refused"):
        looking_last(lambda: 1)()
    looking_last(lambda: 1)()


def test_only_so_many_are_put_off() -> None:
    seen = []
    x, run = differentiable(lambda: seen.append(1))
    for _ in range(MOST + 3):
        run(x)
    assert len(seen) == 3
    run(x)[0].sum().backward()
    assert len(seen) == MOST + 4


def test_any_output_will_do_whatever_it_is_of() -> None:
    """As where the attention itself takes no gradient."""
    for chosen in range(2):
        x = torch.ones(2, requires_grad=True)

        def graph(x):
            later(refuse, NOT_YET)
            return x * 2, x.exp()

        with pytest.raises(RuntimeError, match="refused"):
            looking_last(graph)(x)[chosen].sum().backward()


def test_a_graph_that_a_checkpoint_runs_again_looks_at_the_end_of_that_backward() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    run = looking_last(lambda x: (Graph.apply(x.exp(), lambda: seen.append("look"), NOT_YET),))
    with set_checkpoint_early_stop(False):
        out = checkpoint(lambda x: run(x)[0], x, use_reentrant=False)
    x.register_hook(lambda g: seen.append("gradient"))
    assert seen == []
    out.sum().backward()
    assert seen == ["gradient", "look", "look"]
