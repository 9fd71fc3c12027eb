"""What is erased once nothing reads it, and what must stay: effects on what is alive.

Knows nothing of attention: `needed` stands for a replaced call.
"""

import operator

import pytest
import torch
from torch.fx import Graph, GraphModule

from cudnn_flex_compile.passes.write.prune import live_nodes, prune


def functional(graph, x):
    made = graph.call_function(torch.zeros, (3,))
    return graph.call_method("add", (made, x))


def written_then_read(graph, x):
    made = graph.call_method("new_zeros", (x, 3))
    graph.call_function(operator.setitem, (made, 0, x))
    return graph.call_function(operator.getitem, (made, slice(1)))


def written_twice(graph, x):
    made = graph.call_function(torch.zeros, (3,))
    other = graph.call_function(torch.ones, (3,))
    graph.call_function(operator.setitem, (other, 0, 2.0))
    graph.call_function(operator.setitem, (made, 0, other))
    return made


def mapped(graph, x):
    graph.call_function(torch._functorch.vmap.lazy_load_decompositions, ())
    level = graph.call_function(torch._C._functorch._vmap_increment_nesting, (3, "error"))
    batched = graph.call_function(torch._C._functorch._add_batch_dim, (x, 0, level))
    result = graph.call_function(torch._C._functorch._remove_batch_dim, (batched, level, 3, 0))
    graph.call_function(torch._C._functorch._vmap_decrement_nesting, ())
    return result


DEAD = [functional, written_then_read, written_twice, mapped]


def build(make, needed):
    """A graph where what `make` writes was needed and is not any more, unless `needed`; and what was alive before."""
    graph = Graph()
    x = graph.placeholder("x")
    made = make(graph, x)
    result = graph.call_method("mul", (x, made))
    graph.output((result,))
    before = live_nodes(graph)
    if not needed:
        result.replace_input_with(made, x)
    return graph, before


@pytest.mark.parametrize("make", DEAD)
def test_the_dead_go(make):
    graph, before = build(make, needed=False)
    prune(graph, before)
    assert [n.op for n in graph.nodes] == ["placeholder", "call_method", "output"]
    assert torch.equal(GraphModule(torch.nn.Module(), graph)(torch.full((3,), 3.0))[0], torch.full((3,), 9.0))


@pytest.mark.parametrize("make", DEAD)
def test_the_living_stay(make):
    graph, before = build(make, needed=True)
    count = len(graph.nodes)
    prune(graph, before)
    assert len(graph.nodes) == count


def into_the_input(graph, x):
    graph.call_function(operator.setitem, (x, 0, 5.0))
    return x


def into_a_view_of_the_input(graph, x):
    view = graph.call_method("view", (x, 3))
    graph.call_function(operator.setitem, (view, 0, 5.0))
    return view


def by_a_method(graph, x):
    return graph.call_method("add_", (x, 1.0))


def by_what_was_computed(graph, x):
    made = graph.call_function(torch.zeros, (3,))
    graph.call_function(operator.setitem, (made, 0, 5.0))
    graph.call_method("copy_", (x, made))
    return made


@pytest.mark.parametrize("make", [into_the_input, into_a_view_of_the_input, by_a_method, by_what_was_computed])
def test_effects_on_the_living_stay(make):
    graph, before = build(make, needed=False)
    prune(graph, before)
    x, expected = torch.ones(3), torch.ones(3)
    whole, _ = build(make, needed=False)
    GraphModule(torch.nn.Module(), whole)(expected)
    GraphModule(torch.nn.Module(), graph)(x)
    assert not torch.equal(expected, torch.ones(3))
    assert torch.equal(x, expected)


def test_what_was_dead_before_is_not_touched():
    graph = Graph()
    x = graph.placeholder("x")
    graph.call_method("add", (x, 1.0))
    graph.output((x,))
    prune(graph, live_nodes(graph))
    assert len(graph.nodes) == 3


def test_the_levels_of_a_dead_vmap_stay_with_it():
    graph = Graph()
    x = graph.placeholder("x")
    needed = mapped(graph, x)
    mapped(graph, x)
    result = graph.call_method("mul", (x, needed))
    graph.output((result,))
    before = live_nodes(graph)
    result.replace_input_with(needed, x)
    prune(graph, before)
    x = torch.full((3,), 3.0)
    assert torch.equal(GraphModule(torch.nn.Module(), graph)(x)[0], x * x)


def test_what_was_dead_within_a_level_goes_with_it():
    graph = Graph()
    x = graph.placeholder("x")
    made = mapped(graph, x)
    batched = next(n for n in graph.nodes if n.target is torch._C._functorch._add_batch_dim)
    with graph.inserting_after(batched):
        graph.call_method("add", (batched, 1.0))
    result = graph.call_method("mul", (x, made))
    graph.output((result,))
    before = live_nodes(graph)
    result.replace_input_with(made, x)
    prune(graph, before)
    assert [n.op for n in graph.nodes] == ["placeholder", "call_method", "output"]
