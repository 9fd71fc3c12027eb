"""Stock flex_attention for a program, compiled by aot_eager on the CPU: right at every shape, and compiled for few."""

import pytest
import torch

from cudnn_flex_compile.kernels import cpu, inductor
from cudnn_flex_compile.kernels.arguments import Arguments
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, I32
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.text import text

Q, KV = ir.index("q"), ir.index("k")
CAPPED = make("tanh", ir.SCORE / 3.0) * 3.0
PROGRAMS = {
    "soft cap + causal": (ir.program(CAPPED, make("ge", Q, KV)), (), []),
    "slopes and a window": (
        ir.program(ir.SCORE + ir.operand(0, F32, "h") * ir.cast(Q - KV, F32), make("ge", ir.scalar(0, I32), Q - KV)),
        ((1, 2, 1, 1),), [20],
    ),
}  # fmt: skip
LENGTHS = (48, 64, 100, 37, 80, 33, 129, 50, 90, 70)  # more than Dynamo compiles one piece of code for


@pytest.fixture(autouse=True)
def by_aot_eager(trainable, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile(f, backend="aot_eager", **how))
    inductor._compiled.cache_clear()
    yield
    inductor._compiled.cache_clear()


def draw(length):
    return [torch.randn(3, heads, length, 16) for heads in (4, 2, 2)]


@pytest.mark.parametrize("name", PROGRAMS)
def test_right_at_every_length_and_compiled_twice(name):
    program, shapes, ints = PROGRAMS[name]
    operands = [torch.randn(shape).repeat_interleave(2, 1) for shape in shapes]
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for length in LENGTHS:
        qkv = draw(length)
        rest = Arguments(operands, ints, [], text(program), 0.25)
        out, lse = inductor.forward(*qkv, rest)
        expected, expected_lse = torch.empty_like(out), torch.empty_like(lse)
        cpu.forward(*qkv, rest, expected, expected_lse)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-5)
    assert graphs["unique_graphs"] - before <= 2


def differentiated(program, floats=(), scale=0.25):
    """Outputs and gradients of the fallback and of the interpreter."""
    qkv, floats = draw(LENGTHS[0]), [torch.tensor(f, dtype=torch.float64) for f in floats]
    rest = Arguments([], [], floats, text(program), scale)
    out, lse = inductor.forward(*qkv, rest)
    grad = torch.randn_like(out)
    wanted, wanted_lse = torch.empty_like(out), torch.empty_like(lse)
    cpu.forward(*qkv, rest, wanted, wanted_lse)
    found = (out, *inductor.backward(grad, None, *qkv, rest))
    return found, (wanted, *cpu.backward(grad, None, *qkv, out, lse, rest)[:3])


@pytest.mark.parametrize("constants", [(0.5, 0.25, -3.0), (10, 20, 30)], ids=["floats", "ints"])
def test_programs_that_differ_in_a_constant(constants):
    """Dynamo would make it symbolic, having compiled the same code for another program."""
    for constant in constants:
        if isinstance(constant, float):
            program = ir.program(CAPPED * constant)
        else:
            program = ir.program(ir.SCORE, make("ge", ir.const(constant, I32), Q - KV))
        torch.testing.assert_close(*differentiated(program), rtol=1e-4, atol=1e-5)


def test_a_float_and_a_scale_that_change():
    """The float is captured as a tensor, for which nothing is compiled again."""
    program, graphs = ir.program(ir.SCORE * ir.scalar(0, F32)), torch._dynamo.utils.counters["stats"]
    torch.testing.assert_close(*differentiated(program, [1.5]), rtol=1e-4, atol=1e-5)
    before = graphs["unique_graphs"]
    for number in range(2, 5):
        torch.testing.assert_close(*differentiated(program, [number / 4]), rtol=1e-4, atol=1e-5)
    assert graphs["unique_graphs"] == before
    for scale in (0.5, 0.125):
        torch.testing.assert_close(*differentiated(program, [1.5], scale), rtol=1e-4, atol=1e-5)


def test_gradients():
    program, _, _ = PROGRAMS["soft cap + causal"]
    for length in LENGTHS[:3]:
        qkv, rest = draw(length), Arguments([], [], [], text(program), 0.25)
        out, lse = inductor.forward(*qkv, rest)
        grad = torch.randn_like(out)
        expected = cpu.backward(grad, None, *qkv, out, lse, rest)
        for found, wanted in zip(inductor.backward(grad, None, *qkv, rest), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
