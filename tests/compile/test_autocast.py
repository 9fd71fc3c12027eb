"""torch.autocast: queries, keys and values are cast as stock flex_attention casts them, in any nesting of regions."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from cudnn_flex_compile.bench.mods import softcap
from cudnn_flex_compile.config import Options
from cudnn_flex_compile.passes.lower_graph import lower_calls
from cudnn_flex_compile.reasons import Code
from cudnn_flex_compile.report.report import collect

pytestmark = [pytest.mark.usefixtures("trainable"), pytest.mark.filterwarnings("ignore")]
INNER = ({}, {"inner_backend": "aot_eager"})  # attention alone runs without an inner backend by default
CAP = softcap(2.0)


def draw(dtype=torch.float32, requires_grad=False):
    tensor = torch.randn(2, 96, 4, 16).to(dtype).transpose(1, 2)
    return tensor.requires_grad_(requires_grad)


def qkv(dtype=torch.float32, requires_grad=False):
    return [draw(dtype, requires_grad) for _ in range(3)]


def attention(q, k, v):
    return flex_attention(q, k, v, CAP)


def run(function, *args, options=INNER[1]):
    with collect() as report:
        out = torch.compile(function, backend="cudnn_flex", options=options)(*args)
    return out, [c.reason and c.reason.code for c in report.calls]


def close(found, expected):
    """Within twice the rounding of stock's output."""
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    allowed = 4 * torch.finfo(found.dtype).eps * max(1.0, float(expected.abs().max()))
    assert (found.double() - expected.double()).abs().max() <= allowed


@pytest.mark.parametrize("options", INNER, ids=["direct", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_are_cast_to_autocasts_dtype(dtype, given, options):
    args = qkv(given)
    with torch.autocast("cpu", dtype):
        found, reasons = run(attention, *args, options=options)
        expected = attention(*args)
    assert reasons == [None]
    assert found.dtype == dtype
    close(found, expected)


def test_inputs_of_two_dtypes():
    args = [draw(), draw(), draw(torch.bfloat16)]  # norms under autocast give float32 queries and keys
    with torch.autocast("cpu", torch.bfloat16):
        found, reasons = run(attention, *args)
        close(found, attention(*args))
    assert reasons == [None]


def nested(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        first = flex_attention(q, k, v, CAP)
        with torch.autocast("cpu", enabled=False):
            second = flex_attention(q, k, v, CAP)
            with torch.autocast("cpu", torch.float16):
                third = flex_attention(q, k, v, CAP)
        fourth = flex_attention(q, k, v, CAP)
    return first, second, third, fourth, flex_attention(q, k, v, CAP)


def test_nested_and_disabled_regions():
    args = qkv()
    found, reasons = run(nested, *args)
    expected = nested(*args)
    assert reasons == [None, Code.DTYPE, None, None, Code.DTYPE]
    assert [f.dtype for f in found] == [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float32]
    for f, e in zip(found, expected, strict=True):
        close(f, e)


def test_a_region_disabled_in_the_graph_under_autocast_outside():
    def call(q, k, v):
        with torch.autocast("cpu", enabled=False):
            inside = flex_attention(q, k, v, CAP)
        return inside, flex_attention(q, k, v, CAP)

    args = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        found, reasons = run(call, *args)
        expected = call(*args)
    assert reasons == [Code.DTYPE, None]
    for f, e in zip(found, expected, strict=True):
        close(f, e)


def test_one_compiled_function_in_and_out_of_autocast():
    function, args = torch.compile(attention, backend="cudnn_flex", options=INNER[1]), qkv()
    for dtype in (torch.bfloat16, torch.float16, None, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            assert function(*args).dtype == (dtype or torch.float32)


@pytest.mark.parametrize("options", INNER, ids=["direct", "aot_eager"])
def test_gradients_have_the_inputs_dtype(options):
    args = qkv(requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, reasons = run(attention, *args, options=options)
    assert reasons == [None]
    grad = torch.randn_like(found)
    gradients = torch.autograd.grad(found, args, grad)
    torch._dynamo.reset()
    half = [t.detach().bfloat16().requires_grad_() for t in args]
    expected, _ = run(attention, *half, options=options)
    assert torch.equal(found, expected)
    for g, e in zip(gradients, torch.autograd.grad(expected, half, grad), strict=True):
        assert g.dtype == torch.float32
        assert torch.equal(g, e.float())


def test_captured_tensors_are_not_cast():
    bias = torch.randn(4, 96) * 1e-3 + 100  # what distinguishes its values is below bfloat16's precision

    def call(q, k, v):
        return flex_attention(q, k, v, lambda s, b, h, i, j: s + bias[h, j] * 50)

    args = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        found, reasons = run(call, *args)
        close(found, call(*args))
    assert reasons == [None]


def test_the_kernel_computes_in_float32_under_autocast():
    args, grad = qkv(torch.bfloat16, requires_grad=True), draw(torch.bfloat16)

    def both(enabled):
        torch._dynamo.reset()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, _ = run(attention, *args, options=INNER[0])
            return out, *torch.autograd.grad(out, args, grad)

    for under, without in zip(both(True), both(False), strict=True):
        assert torch.equal(under, without)


def test_a_kept_call_keeps_its_graph():
    texts = []

    def backend(graph_module, example_inputs):
        texts.append(str(graph_module.graph))
        (call,) = lower_calls(graph_module, example_inputs, Options(tile_lists=False))
        assert call.reason.code is Code.UNKNOWN_OP
        texts.append(str(graph_module.graph))
        return graph_module.forward

    def call(q, k, v):
        return flex_attention(q, k, v, lambda s, *_: torch.special.i0(s))

    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(call, backend=backend)(*qkv())
    assert texts[0] == texts[1]
