"""The ops on the CPU: torch.library's own checks, autograd against a dense reference, and refusals."""

import itertools
import math

import pytest
import torch
from torch.testing._internal.optests import opcheck

from cudnn_flex_compile import ops
from cudnn_flex_compile.engine.problem import strides_like
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, I32
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.text import text
from tests.support import dense

Q, KV = ir.index("q"), ir.index("k")
CAPPED = ir.program(make("tanh", ir.SCORE / 20.0) * 20.0, make("ge", Q, KV))
ALIBI = ir.program(ir.SCORE + ir.operand(0, F32, "h") * (Q - KV), make("ge", Q - KV, ir.const(0, I32)))
WINDOW = ir.program(ir.SCORE * ir.scalar(0, F32), make("ge", ir.scalar(0, I32), Q - KV))


def slopes(heads):
    return torch.linspace(-0.5, 0.5, heads).view(1, heads, 1, 1)


CASES = {
    "soft cap": (CAPPED, lambda heads: ([], [], [])),
    "operand": (ALIBI, lambda heads: ([slopes(heads)], [], [])),
    "scalars": (WINDOW, lambda heads: ([], [5], [torch.tensor(1.5, dtype=torch.float64)])),
}


def draw(*shape, requires_grad=True, layout="BSHD"):
    batch, heads, length, dim = shape
    if layout == "BSHD":
        return torch.randn(batch, length, heads, dim).transpose(1, 2).bfloat16().requires_grad_(requires_grad)
    return torch.randn(shape).bfloat16().requires_grad_(requires_grad)


def arguments(case, return_lse=True, layout="BSHD", requires_grad=True):
    program, rest = CASES[case]
    torch.manual_seed(0)
    query = draw(2, 4, 17, 16, layout=layout, requires_grad=requires_grad)
    key, value = (draw(2, 2, 23, 16, layout=layout, requires_grad=requires_grad) for _ in range(2))
    return (query, key, value, *rest(4), text(program), 0.25, return_lse, True, [], [], "")


@pytest.mark.parametrize(("case", "layout"), list(itertools.product(CASES, ("BSHD", "BHSD"))))
def test_opcheck_attention(case, layout):
    opcheck(ops.attention, arguments(case, layout=layout))
    opcheck(ops.attention, arguments(case, return_lse=False, layout=layout, requires_grad=False))


@pytest.mark.parametrize("case", CASES)
def test_opcheck_backward(case):
    query, key, value, operands, ints, floats, program, scale, *_ = arguments(case, requires_grad=False)
    out, _, stats = ops.attention(query, key, value, operands, ints, floats, program, scale, False, True, [], [], "")
    grad = torch.randn_like(out)
    opcheck(
        ops.attention_backward,
        (grad, torch.randn_like(stats), query, key, value, out, stats, operands, ints, floats, program, scale,
         [], [], ""),
    )  # fmt: skip


def test_opcheck_list_tiles():
    mask, geometry = text(ir.program(mask=make("ge", Q, KV))), [1, 2, 8, 8, 2, 16, 16, 1, 1]
    device, counts, indices = torch.device("cpu"), torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1).int()
    for blocks, sizes in (([], []), ([counts, indices], [128, 128])):
        arguments = (blocks, [], [], [], mask, sizes, geometry, torch.bfloat16, device, 256)
        opcheck(ops.list_tiles, arguments)
        assert ops.list_tiles(*arguments) is ops.list_tiles(*arguments)


def test_opcheck_block_mask():
    counts, indices = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    mask = text(ir.program(mask=make("ge", Q, KV)))
    opcheck(ops.check_block_mask, ([counts, indices], [], [], [], mask, [1, 1, 8, 8], [128, 128]))


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_and_lse(compiled):
    query, key, value, *rest = arguments("soft cap")
    call = torch.compile(ops.attention, backend="aot_eager") if compiled else ops.attention
    out, lse, _ = call(query, key, value, *rest)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (query, key, value), grad)

    def score_mod(s, b, h, q, kv):
        return torch.tanh(s / 20) * 20

    def mask_mod(b, h, q, kv):
        return q >= kv

    expected, stock = (
        dense.with_gradients(query, key, value, score_mod, mask_mod, 0.25, grad, exact) for exact in (True, False)
    )
    assert (lse.detach() * math.log(2) - expected[1]).abs().max() < 1e-4
    for f, e, s in zip((out.detach(), *found), (expected[0], *expected[2:]), (stock[0], *stock[2:]), strict=True):
        assert (f - e).norm() <= 2 * (s - e).norm()


def test_out_follows_the_querys_strides():
    query, key, value, *rest = arguments("soft cap")
    out = ops.attention(query, key, value, *rest)[0]
    assert out.stride() == strides_like(tuple(out.shape), query.stride()) == query.stride()


@pytest.mark.parametrize("with_out", [False, True])
def test_gradients_of_the_lse(with_out):
    query, key, value, *rest = arguments("soft cap")

    def loss(out, natural_lse):
        return natural_lse.sin().sum() + (out.double() ** 2).sum() * with_out

    out, lse, _ = ops.attention(query, key, value, *rest)
    found = torch.autograd.grad(loss(out, lse * math.log(2)), (query, key, value))

    def of_dense(exact):
        leaves = [dense.leaf(t, exact) for t in (query, key, value)]
        capped = dense.attention(
            *leaves, lambda s, b, h, q, kv: torch.tanh(s / 20) * 20, lambda b, h, q, kv: q >= kv, 0.25, exact
        )
        return torch.autograd.grad(loss(*capped), leaves, allow_unused=not with_out)

    for f, e, s in zip(found, of_dense(exact=True), of_dense(exact=False), strict=True):
        assert (f - e).norm() <= 2 * (s - e).norm() if e is not None else not f.any()


def test_a_backward_needs_no_stats_that_the_caller_asked_for():
    *rest, _, stock, layout, by_blocks = arguments("soft cap", return_lse=False)
    gradients = []
    for stats in (True, False):
        out, _, kept = ops.attention(*rest, stats, stock, layout, by_blocks)
        assert kept.numel() == (out.shape[:3].numel() if stats else 0)
        gradients.append(torch.autograd.grad(out.sum(), rest[:3]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_second_derivative_is_refused():
    query, *rest = arguments("soft cap", return_lse=False)
    grad = torch.autograd.grad(ops.attention(query, *rest)[0].sum(), query, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [((2, 4, 8, 16), (1, 4, 8, 16), (2, 4, 8, 16)), ((2, 3, 8, 16), (2, 2, 8, 16), (2, 2, 8, 16)),
     ((2, 4, 8, 16), (2, 4, 8, 8), (2, 4, 8, 8)), ((2, 4, 8, 16), (2, 4, 8, 16), (2, 4, 9, 16))],
)  # fmt: skip
def test_shapes_that_are_no_attention_are_refused(query, key, value):
    tensors = [draw(*shape, requires_grad=False) for shape in (query, key, value)]
    with pytest.raises(ValueError, match="equal batches"):
        ops.attention(*tensors, [], [], [], text(ir.program()), 1.0, False, False, [], [], "")
