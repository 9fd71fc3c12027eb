"""Canonical texts of traced functions: equal for the same computation under other names, different for any other."""

import itertools
import operator

import pytest
import torch
from torch.fx import Graph, GraphModule

from cudnn_flex_compile.scoremod.fingerprint import graph_text

LINES = [
    lambda g, x, y: g.call_function(operator.mul, (x, y)),
    lambda g, x, y: g.call_function(operator.mul, (y, x)),
    lambda g, x, y: g.call_function(operator.add, (x, y)),
    lambda g, x, y: g.call_function(operator.mul, (x, 2)),
    lambda g, x, y: g.call_function(operator.mul, (x, 2.0)),
    lambda g, x, y: g.call_function(operator.mul, (x, True)),
    lambda g, x, y: g.call_function(operator.mul, (x, 0.1)),
    lambda g, x, y: g.call_function(operator.mul, (x, 0.1 + 2**-56)),
    lambda g, x, y: g.call_function(operator.mul, (x, -0.0)),
    lambda g, x, y: g.call_function(operator.mul, (x, 0.0)),
    lambda g, x, y: g.call_function(operator.getitem, (x, (y, y))),
    lambda g, x, y: g.call_function(operator.getitem, (x, [y, y])),
    lambda g, x, y: g.call_function(torch.where, (x, y, 1)),
    lambda g, x, y: g.call_function(torch.div, (x, y)),
    lambda g, x, y: g.call_function(torch.div, (x, y), {"rounding_mode": "floor"}),
    lambda g, x, y: g.call_function(torch.ops.aten.add.Tensor, (x, y)),
    lambda g, x, y: g.call_function(torch.ops.aten.add.Tensor, (x, y), {"alpha": 2}),
    lambda g, x, y: g.call_function(torch.ops.aten.add.Scalar, (x, 2)),
    lambda g, x, y: g.call_method("mul", (x, y)),
    lambda g, x, y: g.call_method("to", (x, torch.float16)),
    lambda g, x, y: g.call_method("to", (x, torch.bfloat16)),
    lambda g, x, y: g.call_method("to", (x, torch.device("cpu"))),
    lambda g, x, y: g.call_method("to", (x, torch.device("cuda", 0))),
    lambda g, x, y: g.call_method("to", (x, torch.device("cuda", 1))),
    lambda g, x, y: g.call_method("to", (x, "cpu")),
    lambda g, x, y: g.call_function(operator.getitem, (x, slice(0, 2, None))),
    lambda g, x, y: x,
    lambda g, x, y: y,
]  # fmt: skip


def module(line, names=("x", "y"), root=None):
    graph = Graph()
    x, y = (graph.placeholder(n) for n in names)
    graph.output(line(graph, x, y))
    return GraphModule(root or torch.nn.Module(), graph)


@pytest.mark.parametrize("line", LINES, ids=[str(i) for i in range(len(LINES))])
def test_names_do_not_matter(line):
    named = module(line, ("l_self_modules_layers_modules_7_slopes", "child_1"))
    assert graph_text(module(line)) == graph_text(named)
    assert graph_text(named) is not None


def test_whatever_else_differs_has_another_text():
    texts = [graph_text(module(line)) for line in LINES]
    for (i, a), (j, b) in itertools.combinations(enumerate(texts), 2):
        assert a != b, f"{i} and {j}: {a}"


def made(scale):
    def function(x):
        return x * scale

    return function


class Method:
    def __call__(self, x):
        return x

    def method(self, x):
        return x


OPAQUE = {
    "a function of the user's": lambda g, x, y: g.call_function(made, (x,)),
    "a closure": lambda g, x, y: g.call_function(made(2), (x,)),
    "a lambda": lambda g, x, y: g.call_function(lambda t: t, (x,)),
    "a method": lambda g, x, y: g.call_function(Method().method, (x,)),
    "a tensor": lambda g, x, y: g.call_function(operator.mul, (x, torch.ones(2))),
    "state of the module": lambda g, x, y: g.call_function(operator.mul, (x, g.get_attr("weight"))),
}


@pytest.mark.parametrize("line", OPAQUE.values(), ids=OPAQUE)
def test_what_two_things_of_one_name_may_be_has_no_text(line):
    root = torch.nn.Module()
    root.weight = torch.nn.Parameter(torch.ones(()))
    assert graph_text(module(line, root=root)) is None


@pytest.mark.parametrize(
    ("name", "value"), [("target", Method()), ("args", (object(),)), ("kwargs", {"x": object()})]
)
def test_objects_have_no_text(name, value):
    found = module(LINES[0])
    setattr(next(n for n in found.graph.nodes if n.op == "call_function"), name, value)
    assert graph_text(found) is None


def test_only_graphs_have_a_text():
    assert graph_text(torch.nn.Identity()) is None
    assert graph_text(None) is None
