"""Packed documents on the GPU, by interval kernels: numbers of 300 layouts, the list itself, layers, CUDA graphs.

Knows nothing of which calls run by intervals (tests/compile/test_documents.py), nor of speed (documents_time.py).
"""

import functools
import itertools
import logging

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile.engine.find_plan import cache_info
from cudnn_flex_compile.engine.tiles.frontend import kernels_missing
from cudnn_flex_compile.engine.tiles.recording import recording_of
from cudnn_flex_compile.engine.tiles.tile_list import Geometry
from cudnn_flex_compile.engine.tiles.tiler import tiler_of
from cudnn_flex_compile.kernels import tile_lists
from cudnn_flex_compile.kernels.row_tables import Recipe
from cudnn_flex_compile.report.report import collect
from cudnn_flex_compile.scoremod.masks.intervals import NARROW, every_endpoint
from tests.support import dense
from tests.support.any_block_masks import as_mask_mod
from tests.support.documents import SPELLINGS, causal_documents, layout

NINETY = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not NINETY or kernels_missing() is not None, reason="no interval kernels here")

LAYOUTS = 300
SHAPES = {  # batch, length, heads, kv heads, head dim, dtype
    "MHA 128": (2, 640, 2, 2, 128, torch.bfloat16), "GQA 64": (1, 513, 4, 1, 64, torch.float16),
    "GQA 128": (2, 333, 4, 2, 128, torch.bfloat16),
}  # fmt: skip


THEIRS = {
    "counts": "mask_block_cnt", "offsets": "mask_block_offset", "indices": "mask_block_idx",
    "masks": "mask_block_masks", "full_counts": "full_block_cnt", "full_offsets": "full_block_offset",
    "full_indices": "full_block_idx",
}  # fmt: skip
LISTED = {  # what a list has for each tile, by the offsets that say of how many
    "": ("indices", "masks"), "full_": ("full_indices",), "k_": ("k_indices", "k_masks", "k_order"),
    "k_full_": ("k_full_indices", "k_full_order"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(shape, seed=0, requires_grad=True):
    batch, length, heads, kv_heads, dim, dtype = shape
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(h):
        return torch.randn(batch, length, h, dim, device="cuda", dtype=dtype, generator=generator).transpose(1, 2)

    query, key, value = (draw(h).requires_grad_(requires_grad) for h in (heads, kv_heads, kv_heads))
    return query, key, value, draw(heads)


def lists_made(monkeypatch):
    """The geometry of each list that is made from here on."""
    made = []

    def handle(listed, device, make=tile_lists._handle):
        made.append(listed.geometry)
        return make(listed, device)

    monkeypatch.setattr(tile_lists, "_handle", handle)
    return made


def hiding(mask):
    return lambda score, b, h, q, kv: torch.where(mask(b, h, q, kv), score, -torch.inf)


def compiled(function, **options):
    given = {"lower": "always", "tile_lists": True, **options}
    return torch.compile(function, backend="cudnn_flex", dynamic=False, options=given)


def attend(spelling):
    def call(q, k, v, ids):
        return flex_attention(q, k, v, hiding(SPELLINGS[spelling](ids)), enable_gqa=q.shape[1] != k.shape[1])

    return call


def assert_right(out, qkv, grad, mask_mod, what=""):
    found = (out.detach(), *torch.autograd.grad(out, qkv, grad))
    scale = qkv[0].shape[-1] ** -0.5
    results = (dense.with_gradients(*qkv, None, mask_mod, scale, grad, exact) for exact in (True, False))
    (out, _, *gradients), (stock, _, *stock_gradients) = results
    names = ("out", "dQ", "dK", "dV")
    for name, mine, exact, theirs in zip(names, found, (out, *gradients), (stock, *stock_gradients), strict=True):
        assert mine.isfinite().all(), f"{what}: {name}"
        error, theirs = (mine.double() - exact).norm(), (theirs.double() - exact).norm()
        least = 1e-6 * mine.numel() ** 0.5  # where the exact gradient is zero, stock's may be
        assert error <= 2 * theirs + least, f"{what}: {name} is off by {error:.3g}, stock by {theirs:.3g}"


@pytest.mark.parametrize(("spelling", "shape"), list(itertools.product(SPELLINGS, SHAPES)))
def test_layouts(spelling, shape):
    """LAYOUTS in all, each by one of the calls; the first, by which the road is chosen, is of ids that ascend."""
    calls = list(itertools.product(SPELLINGS, SHAPES))
    call, mine = compiled(attend(spelling)), calls.index((spelling, shape))
    batch, length = SHAPES[shape][:2]
    query, key, value, grad = inputs(SHAPES[shape])
    with collect() as report:
        for number in (0, *range(mine, LAYOUTS, len(calls))):
            ids = layout(number, batch, length).cuda()
            out = call(query, key, value, ids)
            assert_right(out, (query, key, value), grad, SPELLINGS[spelling](ids), f"layout {number}")
    assert [c.strategies for c in report.calls] == [("tile_lists", "tile_lists")], report.calls[0].reason


def test_the_list_is_the_frontends():
    from cudnn.flex_attention import create_mask_plan

    for shape, by_head in itertools.product(SHAPES.values(), (False, True)):
        batch, length, heads, kv_heads, dim, dtype = shape
        ids = layout(1, batch, length).cuda()
        where = [torch.arange(n, device="cuda").view([-1 if i == d else 1 for i in range(4)]) for d, n in
                 enumerate((batch, heads if by_head else 1, length, length))]  # fmt: skip
        mask = causal_documents(ids)(*where) | (where[3] < 8 * where[1])
        table = every_endpoint(iter([(0, mask)]), (batch, heads, length, length), mask.shape[1], 5).contiguous()
        geometry = Geometry(batch, heads, kv_heads, length, length, dim, dim, mask.shape[1], True, dtype)
        tiler = tiler_of(geometry, 0)
        listed = tiler.exact(table)
        found = listed.layout.views(listed.numbers)
        qkv = (torch.empty(batch, length, h, dim, device="cuda", dtype=dtype) for h in (heads, kv_heads, kv_heads))
        plan = create_mask_plan(table, *qkv, build_backward=True).debug_snapshot()
        for prefix, theirs in (("", plan["forward"]), ("k_", plan["backward"])):
            for mine, name in THEIRS.items():
                there, here = theirs[name], found[prefix + mine]
                assert here.shape[0] == max(1, there.shape[0])  # room for nothing else
                here = here[: there.shape[0]]
                assert torch.equal(here.view(torch.int32), there.view(torch.int32)), (shape, by_head, prefix + mine)


def test_a_recorded_list_is_the_one_that_is_not():
    """And each stays as it is when the next one is made."""
    for batch, length, heads, kv_heads, dim, dtype in SHAPES.values():
        geometry = Geometry(batch, heads, kv_heads, length, length, dim, dim, 1, True, dtype)
        tiler, stream = tiler_of(geometry, 0), torch.cuda.current_stream().cuda_stream
        layouts = (torch.Size((1, NARROW, batch * length)), torch.int32), (torch.Size((3,)), torch.int32)
        recording = recording_of(geometry, tiler.every_tile, Recipe(), layouts, 0, stream)
        assert recording is not None
        lists = []
        for number in (0, 5, 4, 9):
            ids = layout(number, batch, length).cuda()
            where = [torch.arange(n, device="cuda").view([-1 if i == d else 1 for i in range(4)]) for d, n in
                     enumerate((batch, 1, length, length))]  # fmt: skip
            mask = causal_documents(ids)(*where)
            table = every_endpoint(iter([(0, mask)]), (batch, heads, length, length), 1, NARROW)
            (recorded, numbers), exact = recording((table, torch.ones(3, device="cuda"))), tiler.exact(table)
            needed = numbers[3:]
            lists.append([each.layout.views(each.numbers) for each in (recorded, exact)])
            ends = [int(lists[-1][1][f"{kind}offsets"][-1]) for kind in LISTED]
            assert needed.tolist() == ends
        for number, (mine, right) in enumerate(lists):
            assert torch.equal(mine["work"], right["work"]), number
            for kind, listed in LISTED.items():
                assert torch.equal(mine[f"{kind}offsets"], right[f"{kind}offsets"]), (number, kind)
                end = int(right[f"{kind}offsets"][-1])  # behind that may be anything
                for name in listed:
                    assert torch.equal(*(v[name][:end].view(torch.int32) for v in (mine, right))), (number, name)


@pytest.mark.parametrize("with_mask", [False, True])
def test_layers_share_a_list_and_steps_build_nothing(with_mask, monkeypatch):
    made = lists_made(monkeypatch)

    def layers(q, k, v, ids, mask):
        for _ in range(12):
            how = {} if with_mask else {"score_mod": hiding(causal_documents(ids))}
            q = q + flex_attention(q, k, v, block_mask=mask, **how)
        return q

    call, shape = compiled(layers), SHAPES["MHA 128"]
    query, key, value, grad = inputs(shape)
    builds = []
    with collect() as report:
        for step in range(4):
            ids = layout(5 * step, *shape[:2], most=6).cuda()
            mask = create_block_mask(causal_documents(ids), shape[0], None, shape[1], shape[1]) if with_mask else None
            torch.autograd.grad(call(query, key, value, ids, mask), (query, key, value), grad)
            builds.append(cache_info().builds)
    assert [c.strategies for c in report.calls] == [("tile_lists", "tile_lists")] * 12
    assert len(made) == 4  # the first one when it was compiled
    assert len(set(builds)) == 1


def test_a_block_mask_of_other_documents_is_honoured():
    def call(q, k, v, mask):
        return flex_attention(q, k, v, block_mask=mask)

    shape = SHAPES["MHA 128"]
    function, (query, key, value, grad) = compiled(call), inputs(shape)
    batch, length = shape[:2]
    for number in (0, 5, 10):
        ids = layout(number, batch, length).cuda()
        mask = create_block_mask(causal_documents(ids), batch, None, length, length)
        assert_right(function(query, key, value, mask), (query, key, value), grad, causal_documents(ids))
    mask.mask_mod = causal_documents(torch.zeros_like(ids))
    assert_right(function(query, key, value, mask), (query, key, value), grad, as_mask_mod(mask))


def test_manual_capture_is_right_for_any_layout(caplog):
    shape = SHAPES["MHA 128"]
    call = compiled(attend("causal"))
    query, key, value, _ = inputs(shape, requires_grad=False)
    ids = layout(0, *shape[:2]).cuda()
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(2):
            call(query, key, value, ids)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(query, key, value, ids)
        for number in range(5):
            ids.copy_(layout(number, *shape[:2]))
            graph.replay()
            exact, _ = dense.attention(query, key, value, None, causal_documents(ids), shape[4] ** -0.5, True)
            stock, _ = dense.attention(query, key, value, None, causal_documents(ids), shape[4] ** -0.5, False)
            assert (out.double() - exact).norm() <= 2 * (stock.double() - exact).norm(), number
    assert "under CUDA graph capture" in caplog.text


def test_a_gradient_of_the_log_sum_exp():
    shape = SHAPES["GQA 128"]
    query, key, value, grad = inputs(shape)
    ids = layout(4, *shape[:2]).cuda()  # a padded tail, whose rows see nothing
    mask_mod = SPELLINGS["padded"](ids)

    def call(q, k, v, ids):
        how = hiding(SPELLINGS["padded"](ids))
        out, lse = flex_attention(q, k, v, how, enable_gqa=True, return_lse=True)
        return out * torch.where(lse == -torch.inf, 0.0, torch.sigmoid(lse)).unsqueeze(-1).to(out.dtype)

    def exact(q, k, v, high):
        out, lse = dense.attention(q, k, v, None, mask_mod, shape[4] ** -0.5, high)
        return out * torch.where(lse == -torch.inf, 0.0, torch.sigmoid(lse)).unsqueeze(-1).to(out.dtype)

    with collect() as report:
        out = compiled(call)(query, key, value, ids)
    assert report.calls[0].strategies == ("tile_lists", "tile_lists")
    found = torch.autograd.grad(out, (query, key, value), grad)
    wanted = []
    for high in (True, False):
        leaves = [dense.leaf(t, high) for t in (query, key, value)]
        result = exact(*leaves, high)
        wanted.append(torch.autograd.grad(result, leaves, grad.to(result.dtype)))
    for mine, right, stock in zip(found, *wanted, strict=True):
        assert (mine.double() - right).norm() <= 2 * (stock.double() - right).norm() + 1e-6


def test_every_layout_of_tensors_is_taken():
    shape = SHAPES["MHA 128"]
    batch, length, heads, _, dim, dtype = shape
    ids = layout(0, batch, length).cuda()
    whole = torch.randn(batch, length, 3 * heads * dim, device="cuda", dtype=dtype, requires_grad=True)

    def call(x, ids):
        q, k, v = (t.view(batch, length, heads, dim).transpose(1, 2) for t in x.chunk(3, -1))
        return flex_attention(q, k, v, hiding(causal_documents(ids)))

    function = functools.partial(compiled(call), ids=ids)
    out = function(whole)
    grad = torch.randn(batch, heads, length, dim, device="cuda", dtype=dtype)  # another order than the output's
    (found,) = torch.autograd.grad(out, whole, grad)
    qkv = [t.view(batch, length, heads, dim).transpose(1, 2) for t in whole.detach().chunk(3, -1)]
    exact, stock = (
        dense.with_gradients(*qkv, None, causal_documents(ids), dim**-0.5, grad, high)[2:] for high in (True, False)
    )
    for mine, right, theirs in zip(found.chunk(3, -1), exact, stock, strict=True):
        mine = mine.view(batch, length, heads, dim).transpose(1, 2)
        assert (mine.double() - right).norm() <= 2 * (theirs.double() - right).norm()
