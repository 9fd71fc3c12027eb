"""Generated layouts: fakes, the CPU's kernels, CUDA's and the fallback agree about the layout of every output.

Knows nothing of cuDNN: a plan computes on the host, at the addresses that it is given, in the layouts of its problem.
"""

import ctypes
import functools
import random
from dataclasses import dataclass

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing._internal.optests import opcheck

from cudnn_flex_compile import ops, torch_private
from cudnn_flex_compile.engine import find_plan
from cudnn_flex_compile.engine.certify import certify
from cudnn_flex_compile.engine.plans import box_plan, graph_plan
from cudnn_flex_compile.engine.problem import FORWARD, output_specs, stats_spec
from cudnn_flex_compile.kernels import cpu, cuda
from cudnn_flex_compile.kernels.arguments import Arguments
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, I32
from cudnn_flex_compile.scoremod.learned import with_bias
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.text import text
from tests.support import strided
from tests.support.ready import Ready

Q, KV = ir.index("q"), ir.index("k")
CAPPED, CAUSAL = make("tanh", ir.SCORE / 20.0) * 20.0, make("ge", Q, KV)
PREFIX = make("or", CAUSAL, make("lt", KV, ir.const(4, I32)))
PROGRAMS = {
    "soft cap, causal": (ir.program(CAPPED, CAUSAL), ""),
    "prefix, of two parts": (ir.program(CAPPED, PREFIX), ""),
    "slopes": (ir.program(ir.SCORE + ir.operand(0, F32, "h") * ir.cast(Q - KV, F32)), "h"),
    "learned bias": (ir.program(with_bias(CAPPED, ir.operand(0, F32, "hqk")), PREFIX), "hqk"),
}
NUMBER, SCALE = 50, 0.25  # layouts of each program
CHECKS = ("test_schema", "test_faketensor")


@dataclass
class Case:
    """The arguments of the two ops, by the layouts from which they are made, on the host or under a fake mode."""

    views: list[strided.View]  # query, key, value, the gradient of the output, operands
    of_lse: strided.View | None
    dtype: torch.dtype
    program: str

    def forward(self, new):
        query, key, value, _ = new(self.views[:4], self.dtype)
        return query, key, value, new(self.views[4:], torch.float32), [], [], self.program, SCALE

    def backward(self, new, out, stats):
        *_, grad = new(self.views[:4], self.dtype)
        grad_lse = None if self.of_lse is None else new([self.of_lse], torch.float32)[0]
        query, key, value, *rest = self.forward(new)
        return grad, grad_lse, query, key, value, out, stats, *rest


SIZES = {"rows": (1, 9, 16), "columns": (1, 12, 17), "dims": (8, 16)}


def case(name, seed, sizes=SIZES):
    chance = random.Random(f"{name} {seed}")
    program, dims = PROGRAMS[name]
    batch, (heads, kv_heads) = chance.choice((1, 2)), chance.choice(((4, 2), (2, 2), (4, 1), (1, 1)))
    rows, columns, dim, value_dim = (chance.choice(sizes[of]) for of in ("rows", "columns", "dims", "dims"))
    shapes = [(batch, heads, rows, dim), (batch, kv_heads, columns, dim), (batch, kv_heads, columns, value_dim)]
    shapes.append((*shapes[0][:3], value_dim))
    of_pairs = zip("bhqk", (batch, heads, rows, columns), strict=True)
    operand = tuple(size if axis in dims else 1 for axis, size in of_pairs)
    views = strided.views_of(chance, shapes) + [strided.view_of(chance, operand, expandable=range(4))] * bool(dims)
    of_lse = strided.view_of(chance, shapes[0][:3], expandable=range(3)) if not dims and chance.random() < 0.4 else None
    return Case(views, of_lse, chance.choice((torch.bfloat16, torch.float16)), text(program))


def real(views, dtype, device="cpu"):
    return strided.tensors(views, dtype, device) if views else []


def empty(views, dtype):
    return [strided.empty_like_view(view, dtype) for view in views]


def of_fakes(given):
    """What the fakes say that forward and backward return."""
    with FakeTensorMode():
        out, stats = ops.attention_forward(*given.forward(empty), True, [], [], "")
        return out, stats, *ops.attention_backward(*given.backward(empty, out, stats), [], [], "")


def by_ops(given, device="cpu"):
    new = functools.partial(real, device=device)
    out, stats = ops.attention_forward(*given.forward(new), True, [], [], "")
    return out, stats, *ops.attention_backward(*given.backward(new, out, stats), [], [], "")


def by_cuda(given):
    out, stats = cuda.forward(*given.forward(real), True)
    return out, stats, *cuda.backward(*given.backward(real, out, stats))


def layouts(tensors):
    return [(tuple(t.shape), t.stride(), t.dtype) for t in tensors]


def assert_near(found, expected, what):
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        difference, size = (one.float() - other.float()).norm(), other.float().norm()
        assert difference <= 0.03 * size + 1e-2, f"{what}, output {number}: off by {difference} of {size}"


class HostPlan(Ready):
    """The CPU's kernels on the memory at the addresses that a plan is run with."""

    strategy, errors, device = "on the host", (), torch.device("cpu")

    def __init__(self, problem):
        self.problem, self.outputs = problem, output_specs(problem)

    def run(self, tensors, operands, ints, floats, tiles=None):
        self.run_at([tensor.data_ptr() for tensor in tensors], operands, ints, floats)

    def run_at(self, addresses, operands, ints, floats):
        p, stats = self.problem, stats_spec(self.problem)
        inputs = [p.query, p.key, p.value, *([] if p.direction == FORWARD else [p.out, stats, p.grad])]
        tensors = [memory(*of) for of in zip(addresses, (*inputs, *self.outputs), strict=p.stats)]
        operands = [memory(t.data_ptr(), spec) for t, spec in zip(operands, p.operands, strict=True)]
        rest = Arguments(operands, ints, floats, text(p.program), p.scale)
        if p.direction == FORWARD:
            cpu.forward(*tensors[:3], rest, tensors[3], tensors[4].squeeze(-1))
            return
        query, key, value, out, lse, grad, *gradients = tensors
        share = self._share(tensors, rest)
        found = cpu.backward(grad * share, None, query, key, value, out, lse.squeeze(-1), rest)
        for into, gradient in zip(gradients, found, strict=True):
            into.copy_(gradient)


    def _share(self, tensors, rest):
        """Which part of a row's weights the program has, [B, H, Sq, 1]: less than all if it is one part of a mask."""
        query, key, value, out, lse, *_ = tensors
        mine = torch.empty(lse.shape[:3])
        cpu.forward(query, key, value, rest, torch.empty(out.shape, dtype=out.dtype), mine)
        return torch.where(mine == -torch.inf, 0.0, (mine - lse.squeeze(-1)).exp()).unsqueeze(-1).to(out.dtype)


def memory(address, spec):
    assert address % 16 == 0
    count = strided.end((spec.shape, spec.stride, 0))
    data = (ctypes.c_byte * (count * spec.dtype.itemsize)).from_address(address)
    return torch.frombuffer(data, dtype=spec.dtype).as_strided(spec.shape, spec.stride)


@pytest.fixture
def on_the_host(monkeypatch):
    """Lets the code of CUDA run on the CPU, with plans that are not certified."""

    def build(problem, lowering):
        return HostPlan(problem)

    monkeypatch.setattr(torch_private, "current_device", lambda: -1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cuda, "empty", lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype))
    monkeypatch.setattr(box_plan, "ROW_COST", 0)
    monkeypatch.setattr(graph_plan, "_build", build)
    monkeypatch.setattr(certify, "certify", lambda *_: None)
    replaced = {"run_clean": lambda function, device: function(), "recall": lambda *_: None, "keep": lambda *_: None}
    replaced |= {"unusable_device": lambda device: None, "refused": lambda *_: None}
    for name, function in replaced.items():
        monkeypatch.setattr(find_plan, name, function)
    find_plan.cache_clear()
    yield
    find_plan.cache_clear()


@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels_return_what_the_fakes_say(name, on_the_host, monkeypatch):
    """Those of the CPU, CUDA's with a plan, and CUDA's without one, whatever layouts the fallback's results have."""
    wrong = []
    for seed in range(NUMBER):
        given = case(name, seed)
        said, expected = layouts(of_fakes(given)), by_ops(given)
        monkeypatch.setattr(cuda, "find_plan", find_plan.find_plan)
        monkeypatch.setattr(cuda, "inductor", None)
        ran = by_cuda(given)
        monkeypatch.setattr(cuda, "find_plan", lambda call: Reason(Code.UNSUPPORTED_CALL, "for the test"))
        monkeypatch.setattr(cuda, "inductor", Fallback(random.Random(seed)))
        find_plan.cache_clear()
        fell_back = by_cuda(given)
        found = {"CPU": expected, "plan": ran, "fallback": fell_back}
        wrong += [(where, given) for where, outputs in found.items() if layouts(outputs) != said]
        assert_near(ran, expected, given)
        assert_near(fell_back, expected, given)
    assert not wrong, f"{len(wrong)} of {3 * NUMBER}: {wrong[:2]}"


class Fallback:
    """The CPU's kernels, whose results are laid out by chance."""

    def __init__(self, chance):
        self.chance = chance

    def _strided(self, tensor):
        view = strided.view_of(self.chance, tuple(tensor.shape))
        return strided.tensors([view], tensor.dtype)[0].copy_(tensor)

    def forward(self, query, key, value, given, by_blocks):
        out, stats = query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty(query.shape[:3]).float()
        cpu.forward(query, key, value, given, out, stats, by_blocks)
        return self._strided(out), self._strided(stats)

    def backward(self, grad_out, grad_lse, query, key, value, *rest):
        out, stats = self.forward(query, key, value, *rest)
        dq, dk, dv, *dbias = cpu.backward(grad_out, grad_lse, query, key, value, out, stats, *rest)
        return [self._strided(t) for t in (dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), *dbias)]


@pytest.mark.parametrize("name", PROGRAMS)
def test_opcheck(name):
    for seed in range(NUMBER // 10):
        given = case(name, seed)
        opcheck(ops.attention_forward, (*given.forward(real), True, [], [], ""), test_utils=CHECKS)
        out, stats, *_ = by_ops(given)
        opcheck(ops.attention_backward, (*given.backward(real, out, stats), [], [], ""), test_utils=CHECKS)


def test_an_output_that_comes_back_in_another_layout(on_the_host):
    """As torch.autograd.graph.save_on_cpu brings it back: contiguous."""
    given = case("soft cap, causal", 0)
    shape = (2, 4, 16, 16)
    of_rows = (shape, (16 * 64, 16, 64, 1), 0)
    given.views, given.of_lse = [of_rows] * 4, None
    out, stats = cuda.forward(*given.forward(real), True)
    assert not out.is_contiguous()
    expected = cuda.backward(*given.backward(real, out, stats))
    found = cuda.backward(*given.backward(real, out.contiguous(), stats))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert layouts(found) == layouts(expected)


@pytest.mark.parametrize("without", ["batch", "rows"])
def test_tensors_without_entries(without):
    for seed in range(NUMBER // 3):
        given = case("soft cap, causal", seed)
        dim = {"batch": 0, "rows": 2}[without]
        for number, (shape, strides, offset) in enumerate(given.views):
            if without == "batch" or number in (0, 3):
                given.views[number] = ((*shape[:dim], 0, *shape[dim + 1 :]), strides, offset)
        given.of_lse = None
        assert layouts(by_ops(given)) == layouts(of_fakes(given)), given
