"""What writes between two calls is never overlooked, and what does not write never keeps them from sharing.

Knows nothing of which spellings there are (tests/support/written_programs.py).
"""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from cudnn_flex_compile import ops
from cudnn_flex_compile.passes.read.effects import Writers
from cudnn_flex_compile.report.report import collect
from tests.compile.test_backend import close, fresh, qkv, run
from tests.support.any_torch import numbers
from tests.support.written_programs import ARGUMENTS, BOOLEANS, COUNT, FLOATS, INTEGERS, PURE, defined, inputs, program

__all__ = ["fresh"]


@pytest.fixture
def graphs():
    """The graphs that the inner backend "seen" gets, which it runs as they are."""
    found = []

    def inner(graph_module, example_inputs):
        found.append(graph_module.graph)
        return graph_module.forward

    torch._dynamo.register_backend(inner, name="seen")
    yield found
    torch._dynamo.backends.registry._COMPILER_FNS.pop("seen")


def shared(graphs):
    """Whether each call but the first has the operands of the one before; less of kept calls."""
    operands = [(graph, n.args[3]) for graph in graphs for n in graph.nodes if n.target is ops.attention]
    return [mine == before for before, mine in itertools.pairwise(operands)]


def check(number, device, graphs):
    """The report of a generated program, whose results and whose inputs, written into, are right."""
    drawn, state, expected_state = program(number), inputs(number, device), inputs(number, device)
    options = {"lower": "always", "inner_backend": "seen"}
    with collect() as report:
        found = torch.compile(drawn.function, backend="cudnn_flex", options=options)(*state)
    for mine, theirs in zip(found, drawn.function(*expected_state), strict=True):
        close(mine, theirs)
    for mine, theirs in zip(state, expected_state, strict=True):
        torch.testing.assert_close(mine, theirs)
    return report


@pytest.mark.parametrize("number", numbers(COUNT, with_every_torch=60))
def test_generated(number, graphs):
    report, drawn = check(number, "cpu", graphs), program(number)
    assert all(c.reason is None for c in report.calls), [str(c.reason) for c in report.calls]
    for reused, written in zip(shared(graphs), drawn.written, strict=True):
        assert not (reused and written)
        assert reused or written or len(graphs) > 1 or drawn.moves


def writers_of(name, step):
    """The nodes that are said to write into the tensor of this name; None if no graph has it."""
    found = []

    def backend(graph_module, example_inputs):
        nodes = list(graph_module.graph.nodes)
        found.extend(Writers(graph_module).above([n], nodes[-1]) for n in nodes if n.name == f"l_{name}_")
        return graph_module.forward

    lines = f"def program({', '.join(ARGUMENTS)}):", f"view = {name}.view(-1)", step, f"return {name} * 2, q, k, v"
    text = "\n    ".join(lines)
    torch.compile(defined(text), backend=backend)(*inputs(0, "cpu"))
    return found


WRITERS = {"slopes": FLOATS, "lengths": INTEGERS, "columns": BOOLEANS}


@pytest.mark.parametrize(("name", "step"), [(name, step) for name, steps in WRITERS.items() for step in steps])
def test_every_write_is_seen(name, step):
    assert any(writers_of(name, step.format(x=name)))


@pytest.mark.parametrize("step", PURE)
def test_what_does_not_write_is_not_said_to(step):
    assert not any(writers_of("slopes", step.format(c="slopes")))


def twice(change):
    def model(q, k, v, slopes):
        def score_mod(score, b, h, i, j):
            return score + torch.tanh(slopes[h]) * (j - i)

        first = flex_attention(q, k, v, score_mod)
        change(slopes)
        return first, flex_attention(q, k, v, score_mod)

    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda slopes: torch.ops.flex_writes.scale_(slopes, -3.0),
        lambda slopes: F.batch_norm(torch.arange(16.0).view(4, 4), slopes, torch.ones(4), training=True, momentum=0.5),
        torch.nn.LeakyReLU(0.1, True), torch.nn.ReLU6(True), torch.nn.ELU(1.0, True),
        lambda slopes: slopes.__imul__(-3),
    ],
)  # fmt: skip
def test_a_write_between_two_calls(change):
    args, slopes = qkv(length=64), torch.tensor([-2.0, -0.4, 0.1, 0.2])
    found, _ = run(twice(change), *args, slopes.clone(), lower="always")
    for mine, theirs in zip(found, twice(change)(*args, slopes.clone()), strict=True):
        close(mine, theirs)


def test_lengths_that_an_op_advances():
    def model(q, k, v, lengths):
        def score_mod(score, b, h, i, j):
            return torch.where(j < lengths[b], score, -torch.inf)

        first = flex_attention(q, k, v, score_mod)
        torch.ops.flex_writes.advance(lengths, 20)
        return first, flex_attention(q, k, v, score_mod)

    args, lengths = qkv(length=64), torch.tensor([10, 30])
    found, calls = run(model, *args, lengths.clone(), lower="always")
    assert all(c.reason is None for c in calls)
    for mine, theirs in zip(found, model(*args, lengths.clone()), strict=True):
        close(mine, theirs)


def test_statistics_that_an_op_makes_of_the_log_sum_exp():
    """They are the one use of it, and the op's name does not tell that it writes."""

    def model(q, k, v, kept):
        out, lse = flex_attention(q, k, v, return_lse=True)
        torch.ops.flex_writes.double_into(lse, result=kept)
        return out

    args, kept, expected = qkv(length=64), torch.zeros(2, 4, 64), torch.zeros(2, 4, 64)
    run(model, *args, kept, lower="always")
    model(*args, expected)
    torch.testing.assert_close(kept, expected, atol=2**-6, rtol=2**-6)
