"""Biases that require grad, through torch.compile on the CPU: all gradients against dense attention and autograd."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile.reasons import Code
from cudnn_flex_compile.report.report import collect
from cudnn_flex_compile.scoremod.text import infix
from tests.support import dense

BATCH, HEADS, KV_HEADS, LENGTH, DIM = 2, 4, 2, 24, 16
BUCKETS = 8


def causal(b, h, q, kv):
    return q >= kv


def bucket(distance):
    """As T5's: small distances each for itself, all larger ones together."""
    return torch.clamp(distance + BUCKETS // 2, 0, BUCKETS - 1)


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def swin():
    table, index = drawn(2 * LENGTH, HEADS), torch.randint(2 * LENGTH, (LENGTH, LENGTH))
    return [table], lambda table: lambda s, b, h, q, kv: s + table[index[q, kv], h]


def graphormer():
    table, distances = drawn(10, HEADS), torch.randint(10, (BATCH, LENGTH, LENGTH))
    return [table], lambda table: lambda s, b, h, q, kv: s + table[distances[b, q, kv], h]


def t5(dtype=torch.float32):
    table = drawn(BUCKETS, HEADS, dtype=dtype)
    return [table], lambda table: lambda s, b, h, q, kv: s + table[bucket(kv - q), h]


def relative():
    table = drawn(HEADS, 2 * LENGTH)
    return [table], lambda table: lambda s, b, h, q, kv: s + table[h, q - kv + LENGTH]


def parameter(*shape, dtype=torch.float32):
    leading = [n > 1 for n in shape[:-2]]

    def make(bias):
        def score_mod(s, b, h, q, kv):
            where = [i if own else 0 for own, i in zip(leading, (b, h)[2 - len(leading) :], strict=True)]
            return s + bias[(*where, q, kv)]

        return score_mod

    return [drawn(*shape, dtype=dtype)], make


def vector(length, read):
    return [drawn(length)], lambda bias: lambda s, b, h, q, kv: s + read(bias, b, h, q, kv)


def several():
    def make(slopes, bias):
        return lambda s, b, h, q, kv: s + bias[h, q, kv] * 0.5 + slopes[h] * 0.1 * (kv - q) - 0.1 * kv

    return [drawn(HEADS), drawn(HEADS, LENGTH, LENGTH)], make


FORMS = {
    "T5": t5,
    "T5, bfloat16": lambda: t5(torch.bfloat16),
    "relative table": relative,
    "Swin": swin,
    "Graphormer": graphormer,
    "[H, S, S]": lambda: parameter(HEADS, LENGTH, LENGTH),
    "[H, S, S], bfloat16": lambda: parameter(HEADS, LENGTH, LENGTH, dtype=torch.bfloat16),
    "[B, H, S, S]": lambda: parameter(BATCH, HEADS, LENGTH, LENGTH),
    "[1, 1, S, S]": lambda: parameter(1, 1, LENGTH, LENGTH),
    "[S, S]": lambda: parameter(LENGTH, LENGTH),
    "columns": lambda: vector(LENGTH, lambda t, b, h, q, kv: t[kv]),
    "slopes": lambda: vector(HEADS, lambda t, b, h, q, kv: t[h] * 0.1 * (kv - q)),
    "several": several,
}
# What softmax does not see: all scores of a row move together, and the gradient is zero but for rounding.
ROWS = {
    "rows": lambda: vector(LENGTH, lambda t, b, h, q, kv: t[q]),
    "a number for each head": lambda: vector(HEADS, lambda t, b, h, q, kv: t[h]),
}
OPTIONS = {"inner_backend": "aot_eager", "lower": "always"}
MASKS = {"none": None, "causal": causal, "window": lambda b, h, q, kv: (q - kv).abs() <= 9}


def inputs(dtype=torch.bfloat16):
    return [drawn(BATCH, h, LENGTH, DIM, dtype=dtype) for h in (HEADS, KV_HEADS, KV_HEADS)]


def compiled(score_mod, mask_mod=None, inner="aot_eager", **options):
    block_mask = create_block_mask(mask_mod, None, None, LENGTH, LENGTH, device="cpu") if mask_mod else None

    def attend(q, k, v):
        return flex_attention(q, k, v, score_mod, block_mask, enable_gqa=True)

    options = {"inner_backend": inner, "lower": "always", **options}
    return torch.compile(attend, backend="cudnn_flex", options=options, fullgraph=True)


def of_dense(make, mask_mod, leaves, learned, grad, exact):
    copies, own = ([dense.leaf(t, exact) for t in tensors] for tensors in (leaves, learned))
    out, _ = dense.attention(*copies, make(*own), mask_mod, DIM**-0.5, exact)
    return out, *torch.autograd.grad(out, [*copies, *own], grad.to(out.dtype))


def lowered(report):
    assert [str(c.reason) for c in report.kept] == []
    return report.lowered[0]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", [*FORMS, *ROWS])
def test_gradients(form, mask, trainable):
    learned, make = {**FORMS, **ROWS}[form]()
    leaves, grad = inputs(), torch.randn(BATCH, HEADS, LENGTH, DIM).bfloat16()
    with collect() as report:
        out = compiled(make(*learned), MASKS[mask])(*leaves)
    assert lowered(report).strategies == ("native",)
    found = (out.detach(), *torch.autograd.grad(out, [*leaves, *learned], grad))
    exact, stock = (of_dense(make, MASKS[mask], leaves, learned, grad, e) for e in (True, False))
    # What rounding the output and the scores' gradients to 16 bits does: rows' gradients are nothing else.
    own = [dense.leaf(t, True) for t in learned]
    flash = dense.captured_gradients(*leaves, make(*own), MASKS[mask], DIM**-0.5, grad, own, leaves[0].dtype)
    flash = [f.to(t.dtype) for f, t in zip(flash, learned, strict=True)]
    for i, (f, e, s) in enumerate(zip(found, exact, (*stock[:4], *flash), strict=True)):
        assert f.dtype == (leaves[0].dtype if i < 4 else learned[i - 4].dtype)
        error, allowed = (f.double() - e).norm(), 2 * (s.double() - e).norm()
        assert error <= allowed, f"{i}: {error / e.norm():.1e}, {allowed / 2 / e.norm():.1e}"


@pytest.mark.parametrize("form", ["T5", "[H, S, S]", "slopes"])
def test_inductor(form, trainable):
    learned, make = FORMS[form]()
    leaves, grad = inputs(), torch.randn(BATCH, HEADS, LENGTH, DIM).bfloat16()
    with collect() as report:
        out = compiled(make(*learned), causal, "inductor")(*leaves)
    lowered(report)
    found = torch.autograd.grad(out, learned, grad)
    expected = of_dense(make, causal, leaves, learned, grad, exact=True)[4:]
    for f, e in zip(found, expected, strict=True):
        assert (f - e).norm() <= 2**-6 * e.norm()


def test_a_bias_that_the_model_computes(trainable):
    left, right = drawn(HEADS, LENGTH, 3), drawn(HEADS, 3, LENGTH)
    leaves, grad = inputs(), torch.randn(BATCH, HEADS, LENGTH, DIM).bfloat16()

    def attend(q, k, v):
        bias = left @ right
        return flex_attention(q, k, v, lambda s, b, h, i, j: s + bias[h, i, j], enable_gqa=True)

    with collect() as report:
        out = torch.compile(attend, backend="cudnn_flex", options=OPTIONS)(*leaves)
    lowered(report)
    found = torch.autograd.grad(out, [left, right], grad)

    def make(left, right):
        return lambda s, b, h, q, kv: s + (left @ right)[h, q, kv]

    for f, e in zip(found, of_dense(make, None, leaves, [left, right], grad, exact=True)[4:], strict=True):
        assert (f - e).norm() <= 2**-6 * e.norm()


def test_layers_share_one_table_and_add_up_its_gradient(trainable):
    (table,), make = t5()
    leaves = inputs()

    def attend(q, k, v):
        for _ in range(3):
            q = flex_attention(q, k, v, make(table), enable_gqa=True)
        return q

    with collect() as report:
        out = torch.compile(attend, backend="cudnn_flex", options=OPTIONS)(*leaves)
    assert len(report.lowered) == 3
    found = torch.autograd.grad(out.float().sum(), table)[0]
    query, key, value = (dense.leaf(t, True) for t in leaves)
    for _ in range(3):
        query = dense.attention(query, key, value, make(table), None, DIM**-0.5, True)[0]
    expected = torch.autograd.grad(query.sum(), table)[0]
    assert (found - expected).norm() <= 2**-5 * expected.norm()


@pytest.mark.parametrize("needs", [(), (0,), (2,)])
def test_the_bias_alone_or_beside_some(needs, trainable):
    (table,), make = relative()
    leaves = [t.detach().requires_grad_(i in needs) for i, t in enumerate(inputs())]
    with collect() as report:
        out = compiled(make(table))(*leaves)
    lowered(report)
    out.float().sum().backward()
    assert table.grad is not None
    assert [t.grad is not None for t in leaves] == [i in needs for i in range(3)]


def test_without_a_gradient_it_is_a_bias_like_others(trainable):
    (table,), make = relative()
    leaves = [t.detach() for t in inputs()]
    attend = compiled(make(table), lower="always")
    texts = []
    for context in (torch.no_grad, torch.enable_grad):
        with collect() as report, context():
            out = attend(*leaves)
        texts.append("learned(" in infix(lowered(report).program.score))
        assert out.requires_grad == texts[-1]
    assert texts == [False, True]


NO_SUMS = {
    "a factor": lambda t: lambda s, b, h, q, kv: s * t[h],
    "under a function": lambda t: lambda s, b, h, q, kv: torch.tanh(s + t[h]),
    "the mask": lambda t: lambda s, b, h, q, kv: torch.where(t[h] > 0, s, -float("inf")),
}


@pytest.mark.parametrize("form", NO_SUMS)
def test_what_is_no_sum_is_kept(form, trainable):
    slopes = drawn(HEADS)
    with collect() as report:
        compiled(NO_SUMS[form](slopes), inner="eager")(*inputs())
    assert report.kept[0].reason.code is Code.CAPTURED_GRADIENT
    assert "takes part in" in report.kept[0].reason.detail


WRONG = {  # by cuDNN 9.19: score_mod, mask, dtype
    "a score_mod": (lambda t: lambda s, b, h, q, kv: torch.tanh(s) + t[h] * (kv - q), None, torch.bfloat16),
    "a predicate": (lambda t: lambda s, b, h, q, kv: s + t[h] * (kv - q), lambda b, h, q, kv: (q - kv) % 3 == 0,
                    torch.bfloat16),
    "float16": (lambda t: lambda s, b, h, q, kv: s + t[h] * (kv - q), None, torch.float16),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_cudnn_gets_wrong_is_kept(what, trainable):
    make, mask, dtype = WRONG[what]
    with collect() as report:
        compiled(make(drawn(HEADS)), mask, inner="eager")(*inputs(dtype))
    assert [c.reason.code for c in report.kept] == [Code.CAPTURED_GRADIENT]


def test_by_default_a_bias_with_an_entry_for_each_place_is_kept(trainable):
    """Inductor's kernel is the faster one; where it adds up much for each entry, it is not."""
    for form, code in (("[H, S, S]", Code.SLOWER), ("columns", Code.SLOWER), ("slopes", None), ("T5", None)):
        learned, make = FORMS[form]()
        torch._dynamo.reset()
        with collect() as report:
            compiled(make(*learned), inner="eager", lower="when_faster")(*inputs())
        (call,) = report.calls
        assert (call.reason and call.reason.code) == code, form


def test_the_budget_counts_the_gradient_and_what_it_is_made_in(trainable):
    """A float32 bias, its gradient of 16 bits, and a number for each pair, of all batch entries, in whole tiles."""
    learned, make = FORMS["[H, S, S]"]()
    with collect() as report:
        compiled(make(*learned), inner="eager", bias_budget_mb=0)(*inputs())
    reason = report.kept[0].reason
    assert reason.code is Code.BIAS_BUDGET
    assert "its gradient" in reason.detail
    with collect() as report:
        compiled(make(*learned), bias_budget_mb=1)(*inputs())
    lowered(report)


def gated(out, lse):
    return out * torch.sigmoid(lse).unsqueeze(-1).to(out.dtype)


LOSSES = {
    "both": lambda out, lse, weight: (gated(out, lse) * weight.to(out.dtype)).sum(),
    "the log-sum-exp alone": lambda out, lse, weight: (lse * weight[..., 0].to(lse.dtype)).sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", ["T5", "[H, S, S]", "[S, S]", "slopes", "several"])
def test_the_log_sum_exp_in_the_loss(form, loss, trainable):
    learned, make = FORMS[form]()
    leaves, draws = inputs(), torch.randn(4, BATCH, HEADS, LENGTH, DIM)  # slopes are few numbers
    mask = create_block_mask(causal, None, None, LENGTH, LENGTH, device="cpu")

    def attend(q, k, v):
        return flex_attention(q, k, v, make(*learned), mask, enable_gqa=True, return_lse=True)

    def gradients(out, lse, weight, of):
        of_loss = LOSSES[loss](out, lse, weight)
        found = torch.autograd.grad(of_loss, of, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, of, strict=True)]

    def by_dense(exact):
        copies, own = ([dense.leaf(t, exact) for t in tensors] for tensors in (leaves, learned))
        result = dense.attention(*copies, make(*own), causal, DIM**-0.5, exact)
        return [gradients(*result, weight, [*copies, *own]) for weight in draws]

    with collect() as report:
        result = torch.compile(attend, backend="cudnn_flex", options=OPTIONS, fullgraph=True)(*leaves)
    assert lowered(report).strategies == ("native",)
    outputs = [t.detach().requires_grad_() for t in result]
    own, flash = [dense.leaf(t, True) for t in learned], []
    for weight in draws:
        grad, grad_lse = gradients(*outputs, weight, outputs)
        how = make(*own), causal, DIM**-0.5, grad, own, leaves[0].dtype, grad_lse.unsqueeze(-1)
        flash.append([f.to(t.dtype) for f, t in zip(dense.captured_gradients(*leaves, *how), learned, strict=True)])
    found = [gradients(*result, weight, [*leaves, *learned]) for weight in draws]
    stock = [[*s[:3], *f] for s, f in zip(by_dense(False), flash, strict=True)]
    for i, (f, e, s) in enumerate(zip(*(zip(*of, strict=True) for of in (found, by_dense(True), stock)), strict=True)):
        f, e, s = (torch.stack(tensors).double() for tensors in (f, e, s))
        error, allowed = (f - e).norm(), 2 * (s - e).norm()
        assert error <= allowed, f"{i}: {error / e.norm():.1e}, {allowed / 2 / e.norm():.1e}"
