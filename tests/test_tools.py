"""torch's tools see the ops: the FLOP counter, also where calls skip the dispatcher, and the profiler."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.flop_counter import FlopCounterMode

from cudnn_flex_compile import ops
from cudnn_flex_compile.backend import cudnn_flex
from cudnn_flex_compile.bench.mods import causal, softcap
from cudnn_flex_compile.ops import profiling, undispatched
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.text import text

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS, COLUMNS, DIM, VALUE_DIM, HEADS = 48, 64, 16, 32, 4
PLAIN = text(ir.program())
CAPPED = text(ir.program(make("tanh", ir.SCORE / 2.0) * 2.0, make("ge", ir.index("q"), ir.index("k"))))


def draw(heads, length, dim, requires_grad=True):
    return torch.randn(2, length, heads, dim).bfloat16().transpose(1, 2).requires_grad_(requires_grad)


def stock_flops():
    """What torch counts for its own attention ops, forward and backward, on the same shapes (and each head's keys)."""
    query, key = (torch.empty(2, HEADS, length, DIM) for length in (ROWS, COLUMNS))
    value, out = (torch.empty(2, HEADS, length, VALUE_DIM) for length in (COLUMNS, ROWS))
    registry = FlopCounterMode(display=False).flop_registry
    forward = registry[torch.ops.aten._scaled_dot_product_cudnn_attention](query, key, value, out_val=out)
    backward = registry[torch.ops.aten._scaled_dot_product_cudnn_attention_backward]
    return forward, backward(out, query, key, value, out_val=(query, key, value))


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    found = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    return found.get("cudnn_flex.attention_forward"), found.get("cudnn_flex.attention_backward")


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_flops_are_those_of_stock_attention(kv_heads):
    query, key = draw(HEADS, ROWS, DIM), draw(kv_heads, COLUMNS, DIM)
    value = draw(kv_heads, COLUMNS, VALUE_DIM)

    def step():
        ops.attention(query, key, value, [], [], [], PLAIN, 0.25, False, False, [], [], "")[0].sum().backward()

    assert counted(step) == stock_flops()


@pytest.mark.usefixtures("trainable")
@pytest.mark.parametrize(("options", "around"), itertools.product(({}, {"inner_backend": "aot_eager"}), (False, True)))
def test_flops_of_compiled_graphs(options, around):
    """Dynamo runs no compiled code under a FlopCounterMode, so the graph is called as the backend returned it."""
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(cudnn_flex(graph_module, example_inputs, options=options))
        return graphs[-1]

    def call(q, k, v):
        return flex_attention(q.sin(), k, v, softcap(2.0)).cos() if around else flex_attention(q, k, v, softcap(2.0))

    args = draw(HEADS, ROWS, DIM), draw(HEADS, COLUMNS, DIM), draw(HEADS, COLUMNS, VALUE_DIM)
    torch.compile(call, backend=backend)(*args)
    (graph,) = graphs
    assert counted(lambda: graph(*args)[0].sum().backward()) == stock_flops()


def test_calls_go_through_the_dispatcher_where_a_tool_listens(monkeypatch):
    on_gpu = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(undispatched, "PLAIN", (SimpleNamespace,))
    assert not undispatched._dispatched(on_gpu)
    with FlopCounterMode(display=False):
        assert undispatched._dispatched(on_gpu)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert undispatched._dispatched(on_gpu)
    assert not undispatched._dispatched(on_gpu)


@pytest.mark.usefixtures("trainable")
@pytest.mark.parametrize(("options", "around"), itertools.product(({}, {"inner_backend": "aot_eager"}), (False, True)))
def test_a_profile_tells_programs_apart(options, around):
    mask = create_block_mask(causal, None, None, ROWS, ROWS, device="cpu")

    def call(q, k, v):
        out = flex_attention(flex_attention(q, k, v, softcap(2.0)), k, v, softcap(5.0), mask)
        return out.cos() if around else out

    args = [draw(HEADS, ROWS, DIM) for _ in range(3)]
    function = torch.compile(call, backend="cudnn_flex", options=options)
    function(*args)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*args).sum().backward()
    events = [event for event in profile.events() if event.name.startswith("cudnn_flex")]
    programs = ["tanh(score / 2) * 2", "tanh(score / 5) * 5, q >= kv"]
    expected = [(f"cudnn_flex {way}: {p}", f"cudnn_flex::attention_{way}")
                for way in ("forward", "backward") for p in programs]  # fmt: skip
    found = [(event.name, event.cpu_parent.name) for event in events if "::" not in event.name]
    assert sorted(found) == sorted(expected)


def test_without_a_profiler_no_name_is_made():
    profiling._name.cache_clear()
    args = [draw(HEADS, ROWS, DIM, requires_grad=False) for _ in range(3)]
    ops.attention(*args, [], [], [], CAPPED, 0.25, False, False, [], [], "")
    assert profiling._name.cache_info().misses == 0


def test_long_names_are_cut():
    score = ir.SCORE
    for i in range(30):
        score = make("tanh", score / (i + 1.5))
    name = profiling._name("forward", text(ir.program(score)))
    assert len(name) == profiling.LONGEST
    assert name.startswith("cudnn_flex forward: tanh(tanh(")
    assert name.endswith("...")
