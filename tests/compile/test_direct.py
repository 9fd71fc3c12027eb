"""Graphs that are attention and views alone run without an inner compiler; others never do. On the CPU.

Knows nothing of what is lowered (test_backend.py). On the CPU flex_attention refuses gradients, so its check is off.
"""

import warnings

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.nn.attention import flex_attention as module
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import inner
from cudnn_flex_compile.bench.mods import alibi, causal, softcap
from cudnn_flex_compile.report.report import collect
from tests.support.dense import with_gradients

LENGTH = 160


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    torch._dynamo.reset()
    torch.manual_seed(0)
    monkeypatch.setattr(module, "_validate_device", lambda *tensors: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def ran(monkeypatch):
    """Which compilers ran, in order."""
    names = []

    def recorded(name, compile_graph):
        def compile_and_record(*arguments):
            names.append(name)
            return compile_graph(*arguments)

        return compile_and_record

    monkeypatch.setattr(inner.direct, "compile", recorded("direct", inner.direct.compile))
    for name, compile_graph in inner.BACKENDS.items():
        monkeypatch.setitem(inner.BACKENDS, name, recorded(name, compile_graph))
    return names


def draw(heads=4, length=LENGTH):
    return torch.randn(2, length, heads, 16, dtype=torch.bfloat16)


def masked(mask_mod=causal):
    return create_block_mask(mask_mod, None, None, LENGTH, LENGTH, device="cpu")


def compiled(function, **how):
    return torch.compile(function, backend="cudnn_flex", **how)


def plain(q, k, v):
    return flex_attention(q, k, v)


def projected(q, k, v):
    q, k, v = (t.view(2, LENGTH, -1, 16).transpose(1, 2) for t in (q, k, v))
    return flex_attention(q, k, v, softcap(2.0)).transpose(1, 2).flatten(2)


def packed(qkv):
    q, k, v = qkv.chunk(3, dim=2)
    return flex_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def twice(q, k, v):
    return flex_attention(flex_attention(q, k, v, softcap(2.0)), k, v)


slopes = alibi(4, "cpu")


def by_slopes(q, k, v):
    return flex_attention(q, k, v, slopes)


def inputs(function):
    if function is packed:
        return (draw(12),)
    tensors = [draw() for _ in range(3)]
    return [t.flatten(2) if function is projected else t.transpose(1, 2) for t in tensors]


@pytest.mark.parametrize("function", [plain, projected, packed, twice, by_slopes])
def test_views_need_no_compiler(ran, function):
    arguments = inputs(function)
    with torch.no_grad(), collect() as report:
        found = compiled(function)(*arguments)
        expected = function(*arguments)
    assert ran == ["direct"]
    report.assert_all_lowered()
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)


def test_a_call_goes_straight_to_the_code(monkeypatch):
    """Modules of Dynamo are lazy: a forward that is taken before it is written looks for that at each call."""
    made, compile_graph = [], inner.direct.compile

    def recorded(graph_module):
        made.append((type(graph_module), compile_graph(graph_module)))
        return made[-1][1]

    monkeypatch.setattr(inner.direct, "compile", recorded)
    with torch.no_grad():
        compiled(plain)(*inputs(plain))
    ((module_class, run),) = made
    assert run.__func__ is module_class.forward


def with_log_sum_exp(q, k, v):  # which stock code scales
    return flex_attention(q, k, v, return_lse=True)[1]


def times_two(q, k, v):
    return flex_attention(q * 2, k, v)


def in_place(q, k, v):
    q.mul_(2)
    return flex_attention(q, k, v)


def conditional(q, k, v):  # kept: the call itself is the compiler's
    return flex_attention(q, k, v, lambda s, b, h, i, j: torch.where(s > 0, s, -s))


@pytest.mark.parametrize("function", [times_two, in_place, conditional, with_log_sum_exp])
def test_whatever_else_there_is_goes_to_inductor(ran, function):
    arguments = inputs(function)
    with torch.no_grad():
        expected = function(*(t.clone() for t in arguments))
        found = compiled(function)(*(t.clone() for t in arguments))
    assert ran == ["inductor"]
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(
    ("how", "who"),
    [
        ({"mode": "reduce-overhead"}, "inductor"),
        ({"mode": "max-autotune-no-cudagraphs"}, "direct"),
        ({"options": {"inner_options": {"epilogue_fusion": False}}}, "inductor"),
        ({"options": {"inner_backend": "aot_eager"}}, None),
    ],
)
def test_asking_inductor_for_more_gets_it(ran, how, who):
    with torch.no_grad():
        compiled(plain, **how)(*inputs(plain))
    assert ran == ([who] if who else [])


@pytest.mark.parametrize("wanted", ["qkv", "q", "k", "v"])
def test_gradients_of_any_of_the_inputs(ran, wanted):
    q, k, v = (t.requires_grad_(name in wanted) for name, t in zip("qkv", inputs(plain), strict=True))
    mask = masked()
    out = compiled(lambda *t: flex_attention(*t, softcap(2.0), mask))(q, k, v)
    grad = torch.randn_like(out)
    leaves = [t for t in (q, k, v) if t.requires_grad]
    found = torch.autograd.grad(out, leaves, grad)
    assert ran == ["direct"]
    exact, stock = (with_gradients(q, k, v, softcap(2.0), causal, 0.25, grad, e)[2:] for e in (True, False))
    asked = [i for i, name in enumerate("qkv") if name in wanted]
    for f, i in zip(found, asked, strict=True):
        assert (f - exact[i]).norm() <= 2 * (stock[i] - exact[i]).norm() + 1e-6


def test_a_gradient_that_is_expanded(ran):
    q, k, v = (t.requires_grad_() for t in inputs(plain))
    found = torch.autograd.grad(compiled(plain)(q, k, v).sum(), (q, k, v))
    expected = with_gradients(q, k, v, None, None, 0.25, torch.ones_like(q), True)[2:]
    for f, e in zip(found, expected, strict=True):
        assert (f - e).norm() <= 2**-6 * e.norm() + 1e-2


def test_the_blocks_of_a_block_mask_are_honoured(ran):
    arguments, mask = inputs(plain), masked()
    function = compiled(lambda q, k, v, m: flex_attention(q, k, v, block_mask=m))
    with torch.no_grad():
        function(*arguments, mask)
        other = masked(lambda b, h, q, kv: q >= kv)
        other.kv_num_blocks.zero_()
        other.full_kv_num_blocks.zero_()
        other.mask_mod = mask.mask_mod
        assert not function(*arguments, other).any()
    assert ran == ["direct"]


def test_lengths_that_change(ran):
    function = compiled(lambda q, k, v: flex_attention(q, k, v, softcap(2.0)), dynamic=True)
    for length in (64, 96, 33):
        arguments = [draw(length=length).transpose(1, 2) for _ in range(3)]
        with torch.no_grad():
            found, expected = function(*arguments), flex_attention(*arguments, softcap(2.0))
        torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)
    assert ran == ["direct"]


class Subclass(torch.Tensor):
    pass


def test_tensors_of_another_type_go_through_autograd_ahead_of_time():
    arguments = [t.as_subclass(Subclass) for t in inputs(plain)]
    graph = torch.fx.symbolic_trace(lambda q: q.transpose(1, 2))
    assert not inner.direct.suffices(graph, arguments, inner.Options())


def test_inductors_code_calls_the_ops_without_the_dispatcher():
    with torch.no_grad():
        _, (code, *_) = run_and_get_code(compiled(times_two), *inputs(times_two))
    assert "torch.ops.cudnn_flex.undispatched_forward(" in code
