"""Biases that require grad, on a GPU, against float64: no further off than twice stock precision, all gradients.

The yardstick of the biases' own gradients is flash attention's: from a rounded output, with scores' gradients that are
rounded as they are for dQ and dK (tests/support/dense.py). Stock's kernel keeps these in float32 on their way to a
bias.
"""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile.kernels import inductor
from cudnn_flex_compile.kernels.arguments import Arguments
from cudnn_flex_compile.reasons import Code
from cudnn_flex_compile.report.report import collect
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32
from cudnn_flex_compile.scoremod.learned import with_bias
from cudnn_flex_compile.scoremod.text import text
from tests.gpu.test_numerics import inputs, poison
from tests.measure.learned import FORMS
from tests.support import dense

# head dim, length, dtype, query heads for each kv head
SHAPES = (64, 512, 1), (64, 1000, 2), (128, 1024, 2), (128, 1000, 1)  # head dim, length, query heads of a key head
OPTIONS = {"inner_backend": "aot_eager", "lower": "always", "bias_budget_mb": 8192}
DRAWS = 32  # of the output's gradient: a bias of few numbers has a gradient of few numbers, and an error of few
KEPT = 0.05  # the part of the calls that certification may keep: each is right, but nearly all have to be fast


def compiled(score_mod, mask_mod, length, group, **options):
    mask = create_block_mask(mask_mod, None, None, length, length, device="cuda") if mask_mod else None
    torch._dynamo.reset()

    def attend(q, k, v):
        return flex_attention(q, k, v, score_mod, mask, enable_gqa=group > 1)

    return torch.compile(attend, backend="cudnn_flex", options={**OPTIONS, **options})


@pytest.fixture(scope="module")
def reasons():
    """Of each call whose numbers were judged, in this process: why certification kept it, or None."""
    return []


def lowered(report):
    assert [str(c.reason) for c in report.kept] == []


def judge(labels, found, exact, stock):
    """Sums of squares over all draws."""
    quantities = zip(*(zip(*draws, strict=True) for draws in (found, exact, stock)), strict=True)
    for label, (f, e, s) in zip(labels, quantities, strict=False):
        error, off, size = (sum(float(t.double().norm()) ** 2 for t in ts) ** 0.5 for ts in (
            [a - b for a, b in zip(f, e, strict=True)], [a - b for a, b in zip(s, e, strict=True)], e))  # fmt: skip
        assert all(bool(t.isfinite().all()) for t in f), label
        assert error <= 2 * off, f"{label}: {error / size:.2e}, stock {off / size:.2e}"


def check(reasons, form, head_dim, length, dtype, group, heads=4, batch=2, **options):
    *leaves, grad = inputs(head_dim, length, dtype, group, heads, batch)
    learned, make, mask_mod = FORMS[form](batch, heads, length)
    scale = 1 / math.sqrt(head_dim)
    poison()
    with collect() as report:
        out = compiled(make(*learned), mask_mod, length, group, **options)(*leaves)
    (call,) = report.calls
    reasons.append(call.reason)
    assert call.reason is None or call.reason.code is Code.CERTIFICATION, call.reason
    copies, own = ([dense.leaf(t, True) for t in tensors] for tensors in (leaves, learned))
    exact_out = dense.attention(*copies, make(*own), mask_mod, scale, True)[0]
    low = [dense.leaf(t, False) for t in leaves]
    stock_out = dense.attention(*low, make(*(t.detach() for t in learned)), mask_mod, scale, False)[0]
    found, exact, stock = ([] for _ in range(3))
    for _ in range(DRAWS):
        grad = torch.randn_like(grad)
        poison()
        found.append((out, *torch.autograd.grad(out, [*leaves, *learned], grad, retain_graph=True)))
        assert [t.dtype for t in found[-1][4:]] == [t.dtype for t in learned]
        gradients = torch.autograd.grad(exact_out, [*copies, *own], grad.double(), retain_graph=True)
        exact.append((exact_out, *(g.nan_to_num() for g in gradients)))
        of_inputs = torch.autograd.grad(stock_out, low, grad, retain_graph=True)
        of_biases = dense.captured_gradients(*leaves, make(*own), mask_mod, scale, grad, own, dtype)
        stock.append((stock_out, *of_inputs, *(g.to(t.dtype) for g, t in zip(of_biases, learned, strict=True))))
    judge(("out", "dQ", "dK", "dV", "bias", "another bias"), *([
        tuple(t.detach() for t in draw) for draw in draws] for draws in (found, exact, stock)))  # fmt: skip


@pytest.mark.parametrize("form", [f for f in FORMS if f != "Swin"])
@pytest.mark.parametrize(("head_dim", "length", "group"), SHAPES)
def test_within_twice_stock_error(reasons, form, head_dim, length, group):
    check(reasons, form, head_dim, length, torch.bfloat16, group)


@pytest.mark.parametrize(("length", "batch"), [(49, 64), (64, 64), (144, 16)])
def test_windows(reasons, length, batch):
    """Swin's: many windows, each shorter than a tile, of a length that no vector load divides."""
    check(reasons, "Swin", 32, length, torch.bfloat16, 1, heads=4, batch=batch)


@pytest.mark.parametrize("form", ["T5", "[H, S, S], causal", "slopes"])
def test_with_inductor(reasons, form):
    check(reasons, form, 64, 512, torch.bfloat16, 1, inner_backend="inductor")


def test_nearly_all_of_these_are_lowered(reasons):
    """Of the tests above; one may be kept where few of them ran in this process (pytest -n)."""
    if not reasons:
        pytest.skip("none of the tests above ran in this process")
    kept = [str(reason) for reason in reasons if reason is not None]
    assert len(kept) <= max(1, KEPT * len(reasons)), kept


def test_two_layers_share_a_table():
    query, key, value, grad = inputs(64, 512, torch.bfloat16, 1)
    (table,), make, _ = FORMS["T5"](2, 4, 512)

    def attend(q, k, v):
        for _ in range(2):
            q = flex_attention(q, k, v, make(table))
        return q

    torch._dynamo.reset()
    with collect() as report:
        out = torch.compile(attend, backend="cudnn_flex", options=OPTIONS)(query, key, value)
    assert len(report.lowered) == 2
    found = torch.autograd.grad(out, table, grad)[0]
    copies, own = [dense.leaf(t, True) for t in (query, key, value)], dense.leaf(table, True)
    exact = copies[0]
    for _ in range(2):
        exact = dense.attention(exact, *copies[1:], make(own), None, 0.125, True)[0]
    expected = torch.autograd.grad(exact, own, grad.double())[0]
    assert (found - expected).norm() <= 2**-5 * expected.norm()


def test_a_second_run_gives_the_same():
    """Of a gradient that is written, not added up: by pairs, and for a batch of one."""
    leaves = [t.detach()[:1].requires_grad_() for t in inputs(64, 1000, torch.bfloat16, 1)[:3]]
    learned, make, mask = FORMS["[H, S, S], causal"](1, 4, 1000)
    with collect() as report:
        out = compiled(make(*learned), mask, 1000, 1)(*leaves)
    lowered(report)
    grad = torch.randn_like(out)
    first, second = (torch.autograd.grad(out, learned, grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dims", ["hqk", "qk", "bhqk"])
def test_where_no_plan_is_found_inductors_kernel_gives_the_gradient(dims):
    """What runs a shape that has no plan that is right: the op's own fallback. With a float32 bias of pairs, stock's
    backward for head dims from 64 to 128 wants more shared memory than an H200 has (torch 2.11).
    """
    query, key, value, grad = (t.detach() for t in inputs(32, 256, torch.bfloat16, 2))
    sizes = (2, 4, 256, 256)
    bias = torch.randn([n if a in dims else 1 for a, n in zip("bhqk", sizes, strict=True)], device="cuda")
    program = text(ir.program(with_bias(ir.SCORE, ir.operand(0, F32, dims))))
    *_, found = inductor.backward(grad, None, query, key, value, Arguments([bias], [], [], program, 0.125))
    own = dense.leaf(bias, True)

    def score_mod(s, b, h, q, kv):
        return s + own

    copies = [dense.leaf(t, True) for t in (query, key, value)]
    exact = torch.autograd.grad(dense.attention(*copies, score_mod, None, 0.125, True)[0], own, grad.double())[0]
    stock = dense.captured_gradients(query, key, value, score_mod, None, 0.125, grad, [own])[0]
    assert found.shape == bias.shape
    assert (found - exact).norm() <= 2 * (stock - exact).norm()
