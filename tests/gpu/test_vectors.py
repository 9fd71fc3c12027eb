"""Score_mods that add dots of captured vectors, on a GPU, against float64: the calls of tests/compile/test_vectors.py,
at their lengths and at longer ones, and DeepSeek's head dims.
"""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile.report.report import collect
from tests.gpu.test_numerics import poison
from tests.support import vectors

OPTIONS = {"inner_backend": "aot_eager", "lower": "always"}


def lowered(report):
    assert [str(c.reason) for c in report.kept] == []


@pytest.mark.parametrize("sizes", [(vectors.ROWS, vectors.COLUMNS), (250, 266)])
@pytest.mark.parametrize("number", range(40))
def test_generated(number, sizes):
    torch._dynamo.reset()
    call = vectors.drawn(number, *sizes)
    leaves = call.leaves(device="cuda")
    poison()
    with collect() as report:
        out = torch.compile(call.attend("cuda"), backend="cudnn_flex", options=OPTIONS, fullgraph=True)(*leaves)
    lowered(report)
    poison()
    found = [out.detach(), *call.gradients(out, leaves)]
    assert not vectors.wrong(call, found, on_gpu=True), (call.words, report)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("length", [1024, 4000])
def test_deepseek(length, inner):
    """128 + 64 dims, of which the keys' 64 are shared by all heads; stock is what the same heads give, concatenated."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    heads, dims, scale = 16, (128, 64), 192**-0.5
    make = [(heads, dims[0]), (heads, dims[0]), (heads, 128), (heads, dims[1]), (1, dims[1])]
    leaves = [torch.randn(1, h, length, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h, d in make]
    mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, length, length, "cuda")

    def attend(q, k, v, a, c):
        def score_mod(s, b, h, i, j):
            return s + scale * torch.dot(a[b, h, i], c[b, h // heads, j])

        return flex_attention(q, k, v, score_mod, mask, scale=scale)

    def concatenated(q, k, v, a, c):
        q, k = torch.cat([q, a], -1), torch.cat([k, c.expand(-1, heads, -1, -1)], -1)
        return flex_attention(q, k, v, None, mask, scale=scale)

    grad = torch.randn(1, heads, length, 128, device="cuda", dtype=torch.bfloat16)
    with collect() as report:
        out = torch.compile(attend, backend="cudnn_flex", options={**OPTIONS, "inner_backend": inner})(*leaves)
    lowered(report)
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    out = torch.compile(concatenated)(*leaves)
    stock = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    exact = in_float64(leaves, grad, scale)
    for name, f, s, e in zip(("out", "dQ", "dK", "dV", "dA", "dC"), found, stock, exact, strict=True):
        error, allowed = (f - e).norm(), 2 * (s - e).norm()
        assert error <= allowed, f"{name}: {error / e.norm():.2e}, stock {allowed / 2 / e.norm():.2e}"


def in_float64(leaves, grad, scale):
    """A head at a time, because the scores of all take too much memory."""
    q, k, v, a, c = (t.detach().double().requires_grad_() for t in leaves)
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device="cuda").triu(1)
    outs = []
    for h in range(q.shape[1]):
        scores = (q[:, h] @ k[:, h].mT + a[:, h] @ c[:, 0].mT) * scale
        out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, h]
        out.backward(grad[:, h].double())
        outs.append(out.detach())
    return [torch.stack(outs, 1), *(t.grad for t in (q, k, v, a, c))]
