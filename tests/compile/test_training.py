"""Training and inference through each road: the op, the direct runner, AOTAutograd, Inductor."""

import functools
import itertools

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import inner, ops
from cudnn_flex_compile.bench.mods import causal, softcap
from cudnn_flex_compile.inner import direct
from cudnn_flex_compile.ops import autograd
from cudnn_flex_compile.ops.undispatched import PLAIN
from cudnn_flex_compile.report.report import collect
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.text import text

pytestmark = [pytest.mark.usefixtures("trainable"), pytest.mark.filterwarnings("ignore")]
LENGTH = 96
CAP = softcap(2.0)
PROGRAM = text(ir.program(make("tanh", ir.SCORE / 2.0) * 2.0))
TWICE = "torch.compile with aot_autograd does not currently support double backward"


def qkv(wanted="qkv"):
    return [torch.randn(2, LENGTH, 4, 16).bfloat16().transpose(1, 2).requires_grad_(name in wanted) for name in "qkv"]


def attention(q, k, v):
    return flex_attention(q, k, v, CAP)


def through_op(q, k, v):
    return ops.attention(q, k, v, [], [], [], PROGRAM, 0.25, False, False, [], [], "")[0]


def compiled(function=attention, **options):
    return torch.compile(function, backend="cudnn_flex", options=options)


ROADS = {
    "op": lambda: through_op,
    "direct": compiled,
    "eager": functools.partial(compiled, inner_backend="eager"),
    "aot_eager": functools.partial(compiled, inner_backend="aot_eager"),
}
SUBSETS = ["".join(names) for size in (1, 2, 3) for names in itertools.combinations("qkv", size)]


@pytest.mark.parametrize("wanted", SUBSETS)
@pytest.mark.parametrize("road", ROADS)
def test_gradients_for_any_subset(road, wanted):
    function = ROADS[road]()
    every, some = qkv(), qkv(wanted)
    for tensor, other in zip(some, every, strict=True):
        tensor.data.copy_(other)
    out = function(*every)
    grad = torch.randn_like(out)
    expected = dict(zip("qkv", torch.autograd.grad(out, every, grad), strict=True))
    function(*some).backward(grad)
    for name, tensor in zip("qkv", some, strict=True):
        assert tensor.grad is None if name not in wanted else torch.equal(tensor.grad, expected[name])


@pytest.mark.parametrize("grad_needs_grad", [False, True])
@pytest.mark.parametrize("road", [*ROADS, "stock"])
def test_a_second_derivative_raises_stocks_error(road, grad_needs_grad):
    function = torch.compile(attention, backend="aot_eager") if road == "stock" else ROADS[road]()
    query, key, value = qkv()
    out = function(query, key, value)
    grad = torch.randn_like(out).requires_grad_(grad_needs_grad)
    gradient = torch.autograd.grad(out, query, grad, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=TWICE):
        (gradient.square().sum() + query.sum()).backward()


def test_a_second_derivative_raises_stocks_error_through_permuted_keys():
    padding = torch.rand(2, LENGTH) < 0.7

    def padded(q, k, v):
        mask = create_block_mask(lambda b, h, i, j: padding[b, j], 2, None, LENGTH, LENGTH, device="cpu")
        return flex_attention(q, k, v, CAP, mask)

    query, key, value = qkv()
    with collect() as report:
        out = compiled(padded, inner_backend="eager", lower="always")(query, key, value)
    report.assert_all_lowered()
    gradient = torch.autograd.grad(out, key, torch.randn_like(out), create_graph=True)[0]
    with pytest.raises(RuntimeError, match=TWICE):
        gradient.square().sum().backward()


class Layer(nn.Module):
    """One attention between projections, whose parameters require grad."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.project, self.out = nn.Linear(64, 192, dtype=dtype), nn.Linear(64, 64, dtype=dtype)
        self.mask = create_block_mask(causal, None, None, LENGTH, LENGTH, device="cpu")

    def forward(self, x):
        q, k, v = (t.view(*x.shape[:2], 4, 16).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        return x + self.out(flex_attention(q, k, v, CAP, self.mask).transpose(1, 2).flatten(2))


@pytest.fixture
def stats_asked_for(monkeypatch):
    """By road, whether each forward that ran was asked for the log-sum-exp."""
    asked = {"direct": [], "AOT": []}

    def spy(road, function):
        def run(*arguments):
            if type(arguments[0]) in PLAIN:  # not while the graph is traced
                asked[road].append(arguments[8])
            return function(*arguments)

        return run

    def backend(graph_module, example_inputs, options):
        from torch._dynamo.backends.common import aot_autograd

        def compiler(lowered, _):
            for node in lowered.graph.nodes:
                if node.target is ops.attention_forward:
                    node.target = spy("AOT", ops.attention_forward)
            lowered.recompile()
            return lowered.forward

        return aot_autograd(fw_compiler=compiler)(graph_module, example_inputs)

    monkeypatch.setattr(autograd, "forward", spy("direct", autograd.forward))
    monkeypatch.setitem(inner.BACKENDS, "spied", backend)
    return asked


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_no_stats_where_no_gradient_is_recorded(off, stats_asked_for):
    with off():
        compiled()(*qkv())
        compiled(Layer(), inner_backend="spied")(torch.randn(2, LENGTH, 64).bfloat16())
    assert stats_asked_for == {"direct": [False], "AOT": [False]}


def test_stats_come_and_go_with_the_recording_of_gradients(stats_asked_for):
    functions = compiled(), compiled(Layer(), inner_backend="spied")
    args, x = qkv(), torch.randn(2, LENGTH, 64).bfloat16()
    for recording in (True, False, True):
        with torch.set_grad_enabled(recording):
            functions[0](*args)
            functions[1](x)
    assert stats_asked_for == {"direct": [True, False, True], "AOT": [True, False, True]}


def test_fullgraph_training_of_a_model_with_inductor():
    model = nn.Sequential(Layer(), Layer())
    compiled_model = torch.compile(model, backend="cudnn_flex", fullgraph=True)
    stock = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, results = torch.randn(2, LENGTH, 64).bfloat16(), []
    for function in (compiled_model, stock):
        torch._dynamo.reset()
        model.zero_grad()
        with collect() as report:
            out = function(x)
        out.float().square().sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters())])
        if function is compiled_model:
            report.assert_all_lowered()
            assert len(report.lowered) == 2
    for found, expected in zip(*results, strict=True):
        assert (found.float() - expected.float()).norm() <= 2e-2 * expected.float().norm()


def test_the_direct_runner_takes_no_graph_that_inductor_would_compile(monkeypatch):
    ran = []
    monkeypatch.setattr(direct, "compile", lambda graph, real=direct.compile: ran.append("direct") or real(graph))
    monkeypatch.setitem(inner.BACKENDS, "inductor", lambda graph, *_: ran.append("inductor") or graph.forward)
    with torch.no_grad():
        compiled()(*qkv())
        compiled(lambda q, k, v: attention(q, k, v).cos())(*qkv())
        compiled(lambda *t: attention(*(x.to(torch.bfloat16) for x in t)))(*(t.float() for t in qkv()))
    assert ran == ["direct", "inductor", "direct"]
