"""What holds on the GPU besides numbers: plan keys, layouts, scalars, BlockMasks, fallbacks."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from cudnn_flex_compile import cache_clear, cache_info
from cudnn_flex_compile.bench.mods import causal, softcap
from cudnn_flex_compile.kernels import inductor
from cudnn_flex_compile.kernels.arguments import Arguments
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.report.report import collect
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.text import text
from tests.support import dense

AOT = {"inner_backend": "aot_eager"}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    cache_clear()
    torch.manual_seed(0)


def draw(batch=2, heads=4, length=256, dim=64, requires_grad=True):
    tensor = torch.randn(batch, length, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    return tensor.requires_grad_(requires_grad)


def compiled(function, **options):
    return torch.compile(function, backend="cudnn_flex", options={**AOT, **options})


def assert_right(out, qkv, score_mod=None, mask_mod=None, grad=None, gradients=None):
    scale = 1 / math.sqrt(qkv[0].shape[-1])
    grad = torch.zeros_like(out) if grad is None else grad
    exact, stock = (dense.with_gradients(*qkv, score_mod, mask_mod, scale, grad, exact=e) for e in (True, False))
    found = (out.detach(), None, *(gradients or ()))
    for f, e, s in zip(found, exact, stock, strict=False):
        if f is not None:
            assert (f - e).norm() <= 2 * (s - e).norm() + 1e-6


def test_programs_that_differ_in_a_constant_never_share_a_plan():
    qkv = [draw(requires_grad=False) for _ in range(3)]
    for cap in (5.0, 2.0):
        out = compiled(lambda q, k, v, c=cap: flex_attention(q, k, v, softcap(c)))(*qkv)
        assert_right(out, qkv, softcap(cap))
        torch._dynamo.reset()
    assert cache_info().size == 2


def test_a_new_method_at_a_freed_address_gets_its_own_plan():
    class Cap:
        def __init__(self, cap):
            self.cap = cap

        def score_mod(self, score, b, h, q, kv):
            return torch.tanh(score / self.cap) * self.cap

    qkv = [draw(requires_grad=False) for _ in range(3)]
    addresses = set()
    for cap in (5.0, 3.0, 2.0):
        mod = Cap(cap)
        addresses.add(id(mod))
        out = compiled(lambda q, k, v, m=mod: flex_attention(q, k, v, m.score_mod))(*qkv)
        assert_right(out, qkv, softcap(cap))
        del mod
        torch._dynamo.reset()
    assert cache_info().size == 3


def test_a_changing_integer_builds_no_plan_once_it_is_symbolic():
    def call(q, k, v, window):
        def score_mod(score, b, h, qi, ki):
            return torch.where((qi >= ki) & (qi - ki <= window), score, -math.inf)

        return flex_attention(q, k, v, score_mod)

    qkv = [draw() for _ in range(3)]
    function, builds = compiled(call), []
    for window in (16, 40, 64, 100, 200):
        out = function(*qkv, window)
        grad = torch.randn_like(out)
        gradients = torch.autograd.grad(out, qkv, grad)
        builds.append(cache_info().builds)
        assert_right(out, qkv, None, lambda b, h, q, kv, w=window: (q >= kv) & (q - kv <= w), grad, gradients)
    assert builds[1] == builds[-1], builds


def test_a_changing_float_builds_no_plan_once_it_is_symbolic():
    def call(q, k, v, cap):
        return flex_attention(q, k, v, lambda s, b, h, qi, ki: torch.tanh(s / cap) * cap)

    qkv = [draw(requires_grad=False) for _ in range(3)]
    function, builds = compiled(call), []
    for cap in (1.0, 2.0, 3.0, 5.0):
        out = function(*qkv, cap)
        builds.append(cache_info().builds)
        assert_right(out, qkv, softcap(cap))
    assert builds[1] == builds[-1], builds


def test_layouts_of_inputs_and_gradients():
    packed = torch.randn(2, 256, 3, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    views = [packed[:, :, i].transpose(1, 2) for i in range(3)]
    function = compiled(lambda q, k, v: flex_attention(q, k, v, softcap(2.0)))
    out = function(*views)
    for grad in (torch.ones((), device="cuda", dtype=out.dtype).expand(out.shape), torch.randn_like(out).contiguous()):
        gradients = torch.autograd.grad(out, views, grad, retain_graph=True)
        assert_right(out, [t.detach() for t in views], softcap(2.0), None, grad, gradients)
    odd = torch.randn(2 * 4 * 256 * 64 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(2, 4, 256, 64)
    strided = torch.randn(2, 4, 64, 256, device="cuda", dtype=torch.bfloat16).transpose(2, 3)
    assert_right(function(odd, strided, strided), (odd, strided, strided), softcap(2.0))


def test_queries_of_a_larger_batch_than_keys():
    query, key, value = draw(batch=3), draw(batch=1), draw(batch=1)
    mask = create_block_mask(causal, 3, None, 256, 256, device="cuda")
    with collect() as report:
        out = compiled(lambda q, k, v: flex_attention(q, k, v, block_mask=mask))(query, key, value)
    assert not report.kept
    grad = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (query, key, value), grad)
    wide = [t.detach().expand(3, -1, -1, -1) for t in (key, value)]
    exact, stock = (dense.with_gradients(query, *wide, None, causal, 0.125, grad, exact=e)[2:] for e in (True, False))
    for f, e, s in zip(gradients, exact, stock, strict=True):
        summed = [t.sum(0, keepdim=True) if f.shape[0] == 1 else t for t in (e, s.double())]
        assert (f - summed[0]).norm() <= 2 * (summed[1] - summed[0]).norm() + 4e-3 * summed[0].norm()


def test_several_calls_share_plans_and_functions():
    qkv = [draw() for _ in range(3)]
    mod = softcap(3.0)

    def model(q, k, v):
        for _ in range(4):
            q = flex_attention(q, k, v, mod)
        return q

    with collect() as report:
        compiled(model)(*qkv)
    assert len(report.lowered) == 4
    assert cache_info().builds == 2  # one forward, one backward


def test_a_block_mask_with_blocks_of_its_own_is_kept_and_right():
    counts = torch.ones(1, 1, 2, device="cuda", dtype=torch.int32)
    indices = torch.tensor([[[[0, 1], [1, 0]]]], device="cuda", dtype=torch.int32)
    diagonal = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=128)
    qkv = [draw() for _ in range(3)]
    with collect() as report:
        out = compiled(lambda q, k, v: flex_attention(q, k, v, block_mask=diagonal), inner_backend="inductor")(*qkv)
    assert [c.reason.code for c in report.calls] == [Code.BLOCK_MASK]
    assert_right(out, qkv, None, lambda b, h, q, kv: q // 128 == kv // 128)


def test_another_block_mask_after_compilation():
    qkv = [draw(requires_grad=False) for _ in range(3)]
    function = compiled(lambda q, k, v, m: flex_attention(q, k, v, block_mask=m))
    masks = [create_block_mask(causal, None, None, 256, 256, device="cuda") for _ in range(2)]
    for mask in masks:
        assert_right(function(*qkv, mask), qkv, None, causal)
    wrong = create_block_mask(lambda b, h, q, kv: q - kv > 130, None, None, 256, 256, device="cuda")
    wrong.mask_mod = masks[0].mask_mod
    assert_right(function(*qkv, wrong), qkv, None, lambda b, h, q, kv: (q // 128 == 1) & (kv // 128 == 0))


def test_without_a_certified_plan_the_call_runs_on_inductor(monkeypatch):
    from cudnn_flex_compile.kernels import cuda

    qkv = [draw() for _ in range(3)]
    function = compiled(lambda q, k, v: flex_attention(q, k, v, softcap(2.0)))
    grad = torch.randn_like(function(*qkv))
    cache_clear()
    monkeypatch.setattr(cuda, "find_plan", lambda call: Reason(Code.CERTIFICATION, "for the test"))
    out = function(*qkv)
    assert_right(out, qkv, softcap(2.0), None, grad, torch.autograd.grad(out, qkv, grad))


def test_the_fallback_takes_programs_that_differ_in_a_constant_and_floats_that_change():
    qkv = [draw() for _ in range(3)]
    grad = torch.randn_like(qkv[0])
    for limit, factor in ((2.0, 0.5), (3.0, 0.5), (3.0, 0.25)):
        program = text(ir.program(make("tanh", ir.SCORE / limit) * limit * ir.scalar(0, F32)))
        given = (*qkv, Arguments([], [], [torch.tensor(factor, dtype=torch.float64)], program, 0.125))
        out, _ = inductor.forward(*given)

        def score_mod(score, b, h, q, kv, limit=limit, factor=factor):
            return torch.tanh(score / limit) * limit * factor

        assert_right(out, qkv, score_mod, None, grad, inductor.backward(grad, None, *given))


def test_a_new_shape_is_planned_when_it_comes():
    function = torch.compile(
        lambda q, k, v: flex_attention(q, k, v, softcap(2.0)), backend="cudnn_flex", dynamic=True, options=AOT
    )
    with collect() as report:
        for length in (256, 320, 1000, 64):
            qkv = [draw(length=length) for _ in range(3)]
            out = function(*qkv)
            grad = torch.randn_like(out)
            assert_right(out, qkv, softcap(2.0), None, grad, torch.autograd.grad(out, qkv, grad))
    assert len(report.calls) == 1


def test_rows_that_see_no_key():
    def mask_mod(b, h, q, kv):
        return (q >= 100) & (q >= kv)

    qkv = [draw() for _ in range(3)]
    mask = create_block_mask(mask_mod, None, None, 256, 256, device="cuda")
    out = compiled(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), lower="always")(*qkv)
    grad = torch.randn_like(out)
    gradients = torch.autograd.grad(out, qkv, grad)
    assert not out[:, :, :100].any()
    assert not gradients[0][:, :, :100].any()
    assert_right(out, qkv, None, mask_mod, grad, gradients)


def test_checkpointed_regions():
    from torch.utils.checkpoint import checkpoint

    qkv = [draw() for _ in range(3)]

    def block(q, k, v):
        return flex_attention(q.sin(), k, v, softcap(2.0)).cos()

    with collect() as report:
        out = compiled(lambda *t: checkpoint(block, *t, use_reentrant=False))(*qkv)
    assert [str(c.reason) for c in report.kept] == []
    plain = compiled(block)(*qkv)
    grad = torch.randn_like(out)
    assert torch.equal(out, plain)
    for a, b in zip(torch.autograd.grad(out, qkv, grad), torch.autograd.grad(plain, qkv, grad), strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm()


def blocks_of_another_diagonal(b, h, q, kv):
    """One block in each row of blocks, at a length of 2048. Graphs compute all pairs."""
    return (q // 128 + kv // 128) % 16 == 0


def test_a_mask_that_cudnn_skips_less_of_is_kept_as_slower():
    mask = create_block_mask(blocks_of_another_diagonal, None, None, 2048, 2048, device="cuda")
    qkv = [draw(length=2048) for _ in range(3)]
    with collect() as report:
        out = compiled(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), inner_backend="inductor")(*qkv)
    assert [c.reason.code for c in report.calls] == [Code.SLOWER]
    assert_right(out, qkv, None, blocks_of_another_diagonal)
