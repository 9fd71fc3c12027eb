"""Score_mods that add dots of captured vectors, through torch.compile on the CPU: the output and the gradients of
queries, keys, values and both captured tensors, against float64.
"""

import math
import operator
from contextlib import suppress

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile.reasons import Code
from cudnn_flex_compile.report.report import collect
from tests.support import vectors
from tests.support.fastest import KEPT as KEPT_BY_TIME
from tests.support.fastest import make_fastest
from tests.support.vectors import BATCH, COLUMNS, HEADS, ROWS

OPTIONS = {"inner_backend": "aot_eager", "lower": "always"}
COUNT = 40
DIM, LANES = 32, 8


def compiled(function, dynamic=None, **options):
    options = {**OPTIONS, **options}
    return torch.compile(function, backend="cudnn_flex", options=options, fullgraph=True, dynamic=dynamic)


@pytest.mark.parametrize("number", range(COUNT))
def test_generated(number, trainable):
    call = vectors.drawn(number)
    leaves = call.leaves()
    with collect() as report:
        out = compiled(call.attend())(*leaves)
    assert [str(c.reason) for c in report.kept] == [], call.words
    found = [out.detach(), *call.gradients(out, leaves)]
    assert not vectors.wrong(call, found), call.words


def drawn(*shape, dtype=torch.bfloat16, learned=False):
    return torch.randn(shape).to(dtype).requires_grad_(learned)


def qkv(dtype=torch.bfloat16, dim=DIM, kv_heads=HEADS):
    sizes = (HEADS, ROWS), (kv_heads, COLUMNS), (kv_heads, COLUMNS)
    return [drawn(BATCH, *size, dim, dtype=dtype) for size in sizes]


def mod(a, c, factor=0.25, read_q=lambda a, b, h, q: a[b, h, q], read_k=lambda c, b, h, kv: c[b, h, kv]):
    return lambda s, b, h, q, kv: s + factor * torch.dot(read_q(a, b, h, q), read_k(c, b, h, kv))


def rows(dtype=torch.bfloat16, lanes=LANES, length=ROWS, heads=HEADS):
    return drawn(BATCH, HEADS, length, lanes, dtype=dtype), drawn(BATCH, heads, COLUMNS, lanes, dtype=dtype)


HALF = torch.float16
SCALE = DIM**-0.5


def capped_before(a, c):
    return lambda s, b, h, q, kv: torch.tanh(s) + torch.dot(a[b, h, q], c[b, h, kv])


def weighted(a, c, weights):
    return lambda s, b, h, q, kv: s + (a[b, h, q] * c[b, h, kv] * weights).sum()


def permuted(ids):
    return lambda a, b, h, q: a[b, h, ids[q]]


# By name: the call, the reason's code, and what its detail says.
KEPT = {
    "float32": (lambda: (mod(*rows(torch.float32)), qkv()), Code.VECTORS, "lose digits"),
    "float16": (lambda: (mod(*rows(HALF)), qkv()), Code.VECTORS, "lose digits"),
    "another factor": (lambda: (mod(*rows(HALF)), qkv(HALF)), Code.VECTORS, "0.25; with the call's scale, 0.1767767"),
    "a factor of data": (lambda: (mod(*rows(HALF), drawn()), qkv(HALF)), Code.VECTORS, "factor of data"),
    "a learned factor": (lambda: (mod(*rows(), drawn(learned=True)), qkv()), Code.CAPTURED_GRADIENT, "dot's factor"),
    "too long": (lambda: (mod(*rows(lanes=232), SCALE), qkv()), Code.VECTORS, "head dim 264, more than 256"),
    "twice too long": (lambda: (mod(*rows(lanes=120), 0.3), qkv()), Code.VECTORS, "head dim 272, more than 256"),
    "too few": (lambda: (mod(*rows(length=ROWS - 1)), qkv()), Code.VECTORS, "smaller than what the call reads"),
    "keys of each query head": (lambda: (mod(*rows()), qkv(kv_heads=2)), Code.VECTORS, "share a key, 2 each"),
    "added too late": (lambda: (capped_before(*rows()), qkv()), Code.VECTORS, "inside of all"),
    "an index of data": (
        lambda: (mod(*rows(), read_q=permuted(torch.arange(ROWS))), qkv()), Code.VECTORS, "read at gather"),
    "another index": (
        lambda: (mod(*rows(), read_k=lambda c, b, h, kv: c[b, h, kv - 1]), qkv()), Code.VECTORS, "read at kv"),
    "infinite": (lambda: (mod(*rows(), math.inf), qkv()), Code.VECTORS, "too far from the scale"),
    "three vectors": (lambda: (weighted(*rows(), drawn(LANES)), qkv()), Code.UNKNOWN_OP, "no product of two"),
}  # fmt: skip


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that an inner backend of the name `recorded` gets."""
    found = []

    def recorded(graph_module, example_inputs):
        found.append(graph_module)
        return graph_module.forward

    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "recorded", recorded)
    monkeypatch.setitem(torch._dynamo.backends.registry._BACKENDS, "recorded", None)
    return found


@pytest.mark.parametrize("name", KEPT)
def test_kept_with_a_reason(name, graphs, trainable):
    """A kept call runs as before, and nothing is left in the graph of what was written for it."""
    make, code, detail = KEPT[name]
    score_mod, given = make()
    with collect() as report, suppress(IndexError):  # of rows that are too few
        compiled(lambda q, k, v: flex_attention(q, k, v, score_mod, enable_gqa=True), inner_backend="recorded")(*given)
    (call,) = report.kept
    assert call.reason.code is code, str(call.reason)
    assert detail in call.reason.detail, call.reason.detail
    assert not [node for node in graphs[0].graph.nodes if node.target in ("permute", "narrow", torch.cat)]


def test_attention_of_latent_vectors_is_written_as_longer_heads(graphs):
    """With the call's scale as the factor, nothing is multiplied; the queries keep their order in memory."""
    a, c = rows(heads=1)
    query, key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(kv_heads=2))
    score_mod = mod(a, c, DIM**-0.5, read_k=lambda c, b, h, kv: c[b, h // HEADS, kv])
    with torch.no_grad():
        out = compiled(lambda q, k, v: flex_attention(q, k, v, score_mod, enable_gqa=True), inner_backend="recorded")(
            query, key, value
        )
    examples = [n.meta["example_value"] for n in graphs[0].graph.nodes if n.target is torch.cat]
    assert [tuple(e.shape) for e in examples] == [(BATCH, ROWS, HEADS, DIM + LANES), (BATCH, COLUMNS, 2, DIM + LANES)]
    assert not [n for n in graphs[0].graph.nodes if n.target in ("mul", torch.mul, operator.mul)]
    assert out.stride() == query.stride()


def attend_by(a, c, **how):
    return lambda q, k, v: flex_attention(q, k, v, mod(a, c, **how), enable_gqa=True)


def lowered(report):
    assert [str(c.reason) for c in report.kept] == []
    return report.lowered[0]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_trained_by_the_vectors_alone(inner, trainable):
    """Queries, keys and values take no gradient, and one row takes none, because the function stops it."""
    a, c = (t.requires_grad_() for t in rows())
    given = qkv()
    with collect() as report:
        out = compiled(attend_by(a, c, read_q=lambda a, b, h, q: a[b, h, q].detach()), inner_backend=inner)(*given)
    lowered(report)
    found = torch.autograd.grad(out.float().square().sum(), [a, c], allow_unused=True)
    assert found[0] is None
    wide = [t.detach().double().requires_grad_() for t in (a, c)]
    scores = (given[0].double() @ given[1].double().mT) * DIM**-0.5 + 0.25 * wide[0].detach() @ wide[1].mT
    exact = scores.softmax(-1) @ given[2].double()
    (wanted,) = torch.autograd.grad(exact.square().sum(), wide[1:])
    assert (found[1] - wanted).norm() <= 1e-2 * wanted.norm()


def attend(q, k, v, a, c):
    return flex_attention(q, k, v, mod(a, c))


def exactly(q, k, v, a, c, hidden=None):
    q, k, v, a, c = (t.double() for t in (q, k, v, a, c))
    scores = q @ k.mT * SCALE + 0.25 * a @ c.mT
    return (scores if hidden is None else scores.masked_fill(hidden, -math.inf)).softmax(-1) @ v


def test_lengths_that_change(trainable):
    function = compiled(attend)
    with collect() as report:
        for length in (40, 56, 72):
            given = [drawn(BATCH, HEADS, length, n) for n in (DIM, DIM, DIM, LANES, LANES)]
            for tensor in given:
                torch._dynamo.mark_dynamic(tensor, 2)
            exact = exactly(*given)
            assert (function(*given) - exact).norm() <= 5e-3 * exact.norm()
    lowered(report)
    assert (report.counts["graphs"], report.counts["recompiles"]) == (1, 0)


def test_widths_that_change(trainable):
    """Nobody knows how long the vectors are; a call of another width, that is traced before, is not taken for it."""
    given = [drawn(BATCH, HEADS, 40, n) for n in (DIM, DIM, DIM, LANES, LANES)]
    for marked in (False, True):
        torch._dynamo.reset()
        for tensor in given[3:] if marked else ():
            torch._dynamo.mark_dynamic(tensor, 3)
        with collect() as report:
            compiled(attend, inner_backend="eager")(*given)
        assert [call.reason and call.reason.detail.split(" is not")[0] for call in report.calls] == [
            "a vector of a length that may change" if marked else None
        ]


def test_rows_of_a_longer_table_at_lengths_that_change(trainable):
    """Nobody knows whether the table is long enough, and no length is fixed to find out."""
    a, c = drawn(HEADS, 128, LANES), drawn(HEADS, 128, LANES)
    reads = {"read_q": lambda a, b, h, q: a[h, q], "read_k": lambda c, b, h, kv: c[h, kv]}
    function = compiled(attend_by(a, c, **reads), inner_backend="eager")
    with collect() as report:
        for length in (48, 128):
            given = [drawn(BATCH, HEADS, length, DIM) for _ in range(3)]
            for tensor in given:
                torch._dynamo.mark_dynamic(tensor, 2)
            function(*given)
    assert report.kept[0].reason.code is Code.VECTORS
    assert "smaller" in report.kept[0].reason.detail
    assert (report.counts["graphs"], report.counts["recompiles"]) == (1, 0)


def test_documents_beside_vectors(trainable):
    """A mask that reads captured tensors has its operands; keys of one batch entry serve both."""
    ids = torch.arange(COLUMNS).div(9, rounding_mode="floor")
    (a, c), (q, k, v) = rows(), qkv()
    k, v = k[:1], v[:1]
    block_mask = create_block_mask(lambda b, h, q, kv: ids[q] == ids[kv], BATCH, None, ROWS, COLUMNS, "cpu")
    with collect() as report:
        out = compiled(lambda q, k, v: flex_attention(q, k, v, mod(a, c), block_mask))(q, k, v)
    lowered(report)
    exact = exactly(q, k, v, a, c, ids[:ROWS, None] != ids)
    assert (out - exact).norm() <= 5e-3 * exact.norm()


@pytest.mark.parametrize("factor", [0.3, 1 / 3, 7.1])
def test_a_factor_that_is_no_power_of_two_is_exact(factor):
    """Scores of a hundred and more: a row that is rounded would be off by as much as one."""
    a, c = rows()
    a, c = a * 8, c * 8
    given = qkv()
    with torch.no_grad():
        out = compiled(attend_by(a, c, factor=factor))(*given)
    q, k, v = (t.double() for t in given)
    scores = q @ k.mT * DIM**-0.5 + factor * a.double() @ c.double().mT
    exact = scores.softmax(-1) @ v
    stock = scores.float().softmax(-1).bfloat16() @ given[2]
    assert (out - exact).norm() <= 2 * (stock - exact).norm()


def test_stock_is_no_contender(monkeypatch):
    """Inductor has no kernel for a dot, so that a call is lowered for which its kernel would be the faster one."""
    torch._dynamo.reset()
    make_fastest(monkeypatch, KEPT_BY_TIME)
    a, c = rows()
    given = qkv()
    for score_mod, kept in ((None, True), (mod(a, c), False)):
        with collect() as report, torch.no_grad():
            compiled(lambda q, k, v, m=score_mod: flex_attention(q, k, v, m), lower="when_faster")(*given)
        assert bool(report.kept) is kept, report
