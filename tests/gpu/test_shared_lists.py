"""Tile lists on the GPU: any BlockMask, masks at the edges of tiles, lists that outgrow their memory, capture, streams.

Knows nothing of speed. Packed documents are in test_documents.py.
"""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile.engine.tiles.frontend import kernels_missing
from cudnn_flex_compile.kernels import tile_lists
from cudnn_flex_compile.reasons import Code
from cudnn_flex_compile.report.report import collect
from tests.gpu.test_documents import NINETY, SHAPES, assert_right, hiding, inputs, lists_made
from tests.support import dense
from tests.support.any_block_masks import MASKS, SCORES, Case, check
from tests.support.documents import causal_documents, runs_of

pytestmark = pytest.mark.skipif(not NINETY or kernels_missing() is not None, reason="no kernels by tile lists here")

SHORT = (1, 1, 2, 2, 64, torch.bfloat16), (1, 129, 8, 2, 128, torch.bfloat16)
PLAIN = ("plain", "hides")  # scores that change no number
BOTH = ("tile_lists", "tile_lists")
STEPS = 6


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    tile_lists._known.clear()
    tile_lists._needs_of.cache_clear()
    yield
    torch._dynamo.reset()


def compiled(function, **options):
    given = {"strategy": "tile_lists", **options}
    return torch.compile(function, backend="cudnn_flex", dynamic=options.pop("dynamic", False), options=given)


def attend(q, k, v, mask):
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def by_score(mask_mod):
    return lambda q, k, v: flex_attention(q, k, v, hiding(mask_mod), enable_gqa=q.shape[1] != k.shape[1])


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("number", range(len(MASKS)), ids=list(MASKS))
def test_any_block_mask(number, training):
    """Blocks that agree with the mask_mod, and any others, changed between steps; as tests/compile has it on the CPU.
    What shows captured tensors in too many runs is kept.
    """
    ran = 0
    for seed in (number, number + len(MASKS), number + 2 * len(MASKS)):
        case = Case(seed, "cuda", agreeing=0.5)
        case.score = PLAIN[seed % 2]
        case.score_mod = SCORES[case.score](case.given)
        call = check(case, STEPS, training, strategy="tile_lists")
        assert call.reason is None or call.reason.code is Code.SLOWER, (str(case), call.reason)
        ran += call.reason is None
    assert ran or number == list(MASKS).index("padding")


EDGES = {  # of tiles of 128 rows and 128 to 176 columns, and of the sequences
    "one pair": lambda b, h, q, kv: (q == 5) & (kv == 300),
    "all but one pair": lambda b, h, q, kv: (q != 5) | (kv != 300),
    "one row": lambda b, h, q, kv: q == 129,
    "one column": lambda b, h, q, kv: kv == 129,
    "nothing": lambda b, h, q, kv: q < 0,
    "no first rows": lambda b, h, q, kv: (q >= 200) & (kv < q),
    "from a tile's edge": lambda b, h, q, kv: kv >= 128,
    "from behind a tile's edge": lambda b, h, q, kv: kv >= 129,
    "from before a tile's edge": lambda b, h, q, kv: kv >= 127,
    "to a tile's edge": lambda b, h, q, kv: kv < 128,
    "to before a tile's edge": lambda b, h, q, kv: kv < 127,
    "to the last key": lambda b, h, q, kv: kv < 1000,
    "an empty tile between": lambda b, h, q, kv: (kv < 100) | (kv >= 352),
    "sinks and a window": lambda b, h, q, kv: (q >= kv) & ((q - kv < 100) | (kv < 4)),
    "by head": lambda b, h, q, kv: q + 50 * h >= kv,
    "everything": lambda b, h, q, kv: q >= 0,
}


@pytest.mark.parametrize("shape", [*SHAPES.values(), *SHORT], ids=str)
@pytest.mark.parametrize("name", EDGES)
def test_edges(name, shape):
    query, key, value, grad = inputs(shape)
    with collect() as report:
        out = compiled(by_score(EDGES[name]))(query, key, value)
    (call,) = report.calls
    rejected = call.reason is not None and call.reason.code is Code.CERTIFICATION  # a gradient of one row alone may be
    assert rejected or call.strategies == BOTH, call.reason
    assert_right(out, (query, key, value), grad, EDGES[name], name)


def packed(seed, count, length, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([runs_of(count, length, generator) for _ in range(batch)]).cuda()


@pytest.mark.parametrize("with_mask", [False, True])
def test_a_list_that_outgrows_its_memory_is_made_anew(with_mask):
    """From one document to many and back, some steps each: recorded, and by ids in no order in between."""
    shape = (1, 4096, 2, 2, 64, torch.bfloat16)
    query, key, value, grad = inputs(shape)

    def call(q, k, v, ids, mask):
        how = {} if with_mask else {"score_mod": hiding(causal_documents(ids))}
        return flex_attention(q, k, v, block_mask=mask, **how)

    run = compiled(call)
    for step, count in enumerate((64, 64, 64, 64, 64, 1, 64, 300, 300, 300, 300, 0, 0, 64, 64)):
        ids = packed(step, count or 30, 4096)
        if count == 0:
            ids = ids[:, torch.randperm(4096, generator=torch.Generator().manual_seed(step)) // 64 * 64]
        mask = create_block_mask(causal_documents(ids), 1, None, 4096, 4096) if with_mask else None
        out = run(query, key, value, ids, mask)
        assert_right(out, (query, key, value), grad, causal_documents(ids), f"step {step}")


def test_layers_compiled_one_by_one_share_a_list_and_wait_for_nothing(monkeypatch):
    made, shape = lists_made(monkeypatch), SHAPES["MHA 128"]
    query, key, value, grad = inputs(shape)
    layers = [compiled(lambda q, k, v, mask, i=i: q + i * attend(q, k, v, mask)) for i in range(2)]
    ids = packed(0, 5, shape[1], shape[0])
    for _ in range(4):
        mask = create_block_mask(causal_documents(ids), shape[0], None, shape[1], shape[1])
        before = len(made)
        out = query
        for layer in range(4):
            out = layers[layer % 2](out, key, value, mask)
            torch.cuda.set_sync_debug_mode("error" if before else "default")  # the list is there from now on
        torch.autograd.grad(out, (query, key, value), grad)
        torch.cuda.set_sync_debug_mode("default")
        assert len(made) == before + 1


def test_a_constant_list_is_captured_as_it_is(monkeypatch):
    made, shape = lists_made(monkeypatch), SHAPES["GQA 64"]
    query, key, value, _ = inputs(shape, requires_grad=False)
    run = compiled(by_score(lambda b, h, q, kv: (q >= kv) & (q - kv < 200)))
    with torch.no_grad():
        right = run(query, key, value)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(query, key, value)
        out.zero_()
        graph.replay()
    assert torch.equal(out, right)
    assert len(made) == 1


def test_a_block_mask_that_is_changed_between_replays_is_followed():
    shape = SHAPES["MHA 128"]
    batch, length = shape[:2]
    query, key, value, _ = inputs(shape, requires_grad=False)
    ids, run = packed(0, 5, length, batch), compiled(attend)
    mask = create_block_mask(causal_documents(ids), batch, None, length, length)
    tensors = [t for t in mask.as_tuple() if isinstance(t, torch.Tensor)]
    with torch.no_grad():
        for _ in range(2):
            run(query, key, value, mask)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(query, key, value, mask)
        for seed in range(4):
            ids.copy_(packed(seed, 2 + 3 * seed, length, batch))
            new = create_block_mask(causal_documents(ids), batch, None, length, length)
            for old, tensor in zip(tensors, (t for t in new.as_tuple() if isinstance(t, torch.Tensor)), strict=True):
                old.copy_(tensor)
            graph.replay()
            exact, stock = (
                dense.attention(query, key, value, None, causal_documents(ids), shape[4] ** -0.5, high)[0]
                for high in (True, False)
            )
            assert (out.double() - exact).norm() <= 2 * (stock.double() - exact).norm(), seed


def test_streams_have_lists_of_their_own():
    shape = SHAPES["MHA 128"]
    query, key, value, grad = inputs(shape)
    ids = packed(0, 5, shape[1], shape[0])
    run = compiled(lambda q, k, v, ids: flex_attention(q, k, v, hiding(causal_documents(ids))))
    for _ in range(3):
        for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                out = run(query, key, value, ids)
                assert_right(out, (query, key, value), grad, causal_documents(ids))
            torch.cuda.current_stream().wait_stream(stream)


def test_handles_that_hooks_copied_are_found_out_anew():
    shape = SHAPES["GQA 128"]
    batch, length = shape[:2]
    query, key, value, grad = inputs(shape)
    ids = packed(3, 4, length, batch)
    mask = create_block_mask(causal_documents(ids), batch, None, length, length)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        out = compiled(attend)(query, key, value, mask)
    assert_right(out, (query, key, value), grad, causal_documents(ids))


def test_lengths_that_change_have_the_lists_at_hand():
    run = torch.compile(
        lambda q, k, v, ids: flex_attention(q, k, v, hiding(causal_documents(ids))), backend="cudnn_flex",
        options={"strategy": "tile_lists"},
    )  # fmt: skip
    with collect() as report:
        for length in (640, 768, 513, 640):
            query, key, value, grad = inputs((2, length, 2, 2, 64, torch.bfloat16))
            ids = packed(length, 5, length, 2)
            assert_right(run(query, key, value, ids), (query, key, value), grad, causal_documents(ids), str(length))
    assert {c.strategies for c in report.calls} == {BOTH}
    assert len(report.calls) <= 2


def test_a_list_beyond_the_budget_is_a_reason_of_its_own():
    query, key, value, _ = inputs((1, 8192, 2, 2, 64, torch.bfloat16))
    with collect() as report:
        compiled(by_score(lambda b, h, q, kv: (q - kv) % 64 < 32), bias_budget_mb=1)(query, key, value)
    assert report.calls[0].reason is not None
    assert report.calls[0].reason.code in (Code.LIST_BUDGET, Code.SLOWER)
    query, key, value, _ = inputs((16, 8192, 2, 2, 64, torch.bfloat16))
    ids = packed(0, 2000, 8192, 16)
    torch._dynamo.reset()
    with collect() as report:
        run = compiled(lambda q, k, v, ids: flex_attention(q, k, v, hiding(causal_documents(ids))), bias_budget_mb=1)
        run(query, key, value, ids)
    assert report.calls[0].reason.code is Code.LIST_BUDGET, report.calls[0]


def test_long_documents_take_little_memory():
    """131072 tokens of 128 documents: compared within some of them, for the whole is too much for a dense reference.

    The first step certifies plans, which takes more memory, however long the documents are (engine/certify/slices.py).
    """
    length, dim = 2**17, 64
    query, key, value, grad = inputs((1, length, 2, 1, dim, torch.bfloat16))
    ids = packed(0, 128, length)
    run = compiled(lambda q, k, v, ids: flex_attention(q, k, v, hiding(causal_documents(ids)), enable_gqa=True))
    for room in (2**31, 2**30):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with collect() as report:
            out = run(query, key, value, ids)
        found = torch.autograd.grad(out, (query, key, value), grad)
        assert torch.cuda.max_memory_allocated() - before < room
    assert not report.calls or report.calls[0].strategies == BOTH
    for document in (0, 17, 127):
        (rows,) = (ids[0] == document).nonzero(as_tuple=True)
        near = slice(int(rows[0]), int(rows[-1]) + 1)
        qkv = [t.detach()[:, :, near] for t in (query, key, value)]
        exact, stock = (
            dense.with_gradients(*qkv, None, lambda b, h, q, kv: q >= kv, dim**-0.5, grad[:, :, near], high)
            for high in (True, False)
        )
        mine = [t[:, :, near] for t in (out.detach(), *found)]
        for here, right, theirs in zip(mine, (exact[0], *exact[2:]), (stock[0], *stock[2:]), strict=True):
            assert (here.double() - right).norm() <= 2 * (theirs.double() - right).norm() + 1e-6, document
