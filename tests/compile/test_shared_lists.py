"""Tile lists end to end on the CPU: what is written, who shares a list, and calls with any BlockMask."""

import collections
import gc
import weakref

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import cache_clear, ops
from cudnn_flex_compile.kernels import tile_lists
from cudnn_flex_compile.passes.write import tile_lists as write_lists
from cudnn_flex_compile.report.report import collect
from tests.support.any_block_masks import MASKS, SCORES, Case, check
from tests.support.documents import causal_documents
from tests.support.fastest import make_fastest

BATCH, HEADS, LENGTH, DIM, STEPS = 2, 4, 96, 16, 6
PLAIN = ("plain", "hides")  # scores that change no number


@pytest.fixture(autouse=True)
def on_cpu(trainable, monkeypatch):
    """As if there were kernels for the CPU, and all others were slower."""
    monkeypatch.setattr(write_lists, "unusable", lambda device: None)
    make_fastest(monkeypatch, "all", rest=8.0)
    for most in ("MOST", "NARROW"):  # of endpoints: any mask
        monkeypatch.setattr(write_lists, most, 2**20)
    tile_lists._known.clear()


@pytest.fixture
def made(monkeypatch):
    """The geometry of each list."""
    found = []

    def handle(listed, device, make=tile_lists._handle):
        found.append(listed.geometry)
        return make(listed, device)

    monkeypatch.setattr(tile_lists, "_handle", handle)
    return found


def compiled(function, **options):
    given = {"inner_backend": "aot_eager", "tile_lists": True, **options}
    return torch.compile(function, backend="cudnn_flex", options=given)


def inputs(length=LENGTH, requires_grad=True):
    shapes = [(BATCH, length, heads, DIM) for heads in (HEADS, 2, 2)]
    return [torch.randn(s).bfloat16().transpose(1, 2).detach().requires_grad_(requires_grad) for s in shapes]


def packed(seed, length=LENGTH):
    return torch.randint(0, 5, (BATCH, length), generator=torch.Generator().manual_seed(seed)).sort(-1).values


def mask_of(ids, length=LENGTH):
    return create_block_mask(causal_documents(ids), BATCH, None, length, length, device="cpu", BLOCK_SIZE=32)


def attend(q, k, v, mask):
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("number", range(len(MASKS)), ids=list(MASKS))
def test_any_block_mask(number, training, made):
    """Blocks that agree with the mask_mod, and any others, changed between steps, are honoured by the list's call."""
    for seed in (number, number + len(MASKS), number + 2 * len(MASKS)):
        case = Case(seed, "cpu", agreeing=0.5)
        case.score = PLAIN[seed % 2]
        case.score_mod = SCORES[case.score](case.given)
        call = check(case, STEPS, training, inner_backend="aot_eager", tile_lists=True, lower="when_faster")
        assert (call.strategies, call.reason) == (("tile_lists",), None), str(case)
    assert made


def test_a_block_mask_of_its_own_is_lowered(made):
    """Without a mask_mod: plans, which compute the mask alone, can't run it."""
    case = Case(0, "cpu", agreeing=0)
    assert case.mask == "none"
    case.score_mod, case.score = None, "plain"
    call = check(case, STEPS, True, inner_backend="aot_eager", tile_lists=True)
    assert (call.strategies, call.reason) == (("tile_lists",), None)


def test_layers_compiled_one_by_one_share_a_list(made):
    """Forward and backward, four layers, two graphs: one list a BlockMask, which goes with it."""
    graphs = [compiled(lambda q, k, v, mask, i=i: q + i * attend(q, k, v, mask)) for i in (1, 2)]
    left = None
    for step in range(3):
        mask = mask_of(packed(step))
        before = len(made)
        if left is not None:
            gc.collect()
            assert [ref() for ref in left] == [None] * 2
            assert len(tile_lists._known) == 0
        q, k, v = inputs()
        out = q
        for layer in range(4):
            out = graphs[layer % 2](out, k, v, mask)
        out.sum().backward()
        assert len(made) == before + 1
        left = [weakref.ref(mask.kv_indices), weakref.ref(mask.q_indices)]
        del mask, out


def test_a_write_to_what_is_captured_makes_a_new_list(made):
    ids, call = packed(0), compiled(lambda q, k, v, ids: flex_attention(q, k, v, hiding(causal_documents(ids)),
                                                                       enable_gqa=True))  # fmt: skip
    given = inputs(requires_grad=False)
    for _ in range(3):
        call(*given, ids)
    assert len(made) == 1
    ids.copy_(packed(1))
    for _ in range(3):
        call(*given, ids)
    assert len(made) == 2
    call(*given, ids.clone())
    assert len(made) == 3


def hiding(mask):
    return lambda score, b, h, q, kv: torch.where(mask(b, h, q, kv), score, -torch.inf)


def test_a_mask_of_no_tensor_has_one_list_for_a_geometry(made):
    call = compiled(lambda q, k, v: flex_attention(q, k, v, hiding(lambda b, h, q, kv: q >= kv), enable_gqa=True))
    for _ in range(3):
        call(*inputs())
    assert len(made) == 1
    with torch.inference_mode():
        call(*inputs(requires_grad=False))
    call(*inputs())
    assert len(made) == 2  # the one without gradients is another


def test_cleared_caches_have_no_list(made):
    call = compiled(lambda q, k, v: flex_attention(q, k, v, hiding(lambda b, h, q, kv: q >= kv), enable_gqa=True))
    for _ in range(2):
        call(*inputs())
        call(*inputs())
        cache_clear()
    assert len(made) == 2
    assert len(tile_lists._known) == 0


def test_sizes_that_change_are_those_at_hand(made):
    call = compiled(lambda q, k, v, ids: flex_attention(q, k, v, hiding(causal_documents(ids)), enable_gqa=True))
    with collect() as report:
        for length in (96, 128, 80, 96):
            ids, qkv = packed(length, length), inputs(length)
            found = torch.autograd.grad(call(*qkv, ids).sum(), qkv)
            exact = [t.detach().double().requires_grad_() for t in qkv]
            at = [torch.arange(length).view(view) for view in ((-1, 1), (1, -1))]
            visible = causal_documents(ids)(torch.arange(BATCH).view(-1, 1, 1, 1), 0, *at)
            keys, values = (t.repeat_interleave(2, 1) for t in exact[1:])
            scores = (exact[0] @ keys.mT / DIM**0.5).masked_fill(~visible, -torch.inf)
            right = torch.autograd.grad((scores.softmax(-1) @ values).sum(), exact)
            for f, e in zip(found, right, strict=True):
                assert (f.double() - e).norm() <= 2**-6 * e.norm()
    assert {c.strategies for c in report.calls} == {("tile_lists",)}
    assert len(report.calls) == 2
    assert [g.rows for g in made] == [96, 128, 80, 96]


@pytest.mark.parametrize("heads", [None, HEADS])
def test_heads_have_lists_of_their_own_where_they_differ(heads, made):
    def run(mod, of_mask):
        mask = create_block_mask(mod, BATCH, of_mask, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=32)
        compiled(attend)(*inputs(), mask)
        return made[-1].mask_heads

    assert run(lambda b, h, q, kv: q >= kv, heads) == (heads or 1)
    assert run(lambda b, h, q, kv: q + 32 * h >= kv, HEADS) == HEADS


def test_hooks_of_saved_tensors_may_copy_the_handle():
    call, qkv, ids = compiled(attend), inputs(), packed(3)
    hooks = torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t)
    expected = torch.autograd.grad(call(*qkv, mask_of(ids)).sum(), qkv)
    with hooks:
        out = call(*qkv, mask_of(ids))
    for found, right in zip(torch.autograd.grad(out.sum(), qkv), expected, strict=True):
        assert torch.equal(found, right)


def test_a_list_is_made_as_early_as_can_be():
    """Its outcome is looked at when the first call is launched: by then it should be there."""
    seen = []

    def inspect(graph_module, example_inputs):
        seen.extend(n.target if n.op == "call_function" else n.op for n in graph_module.graph.nodes)
        return graph_module

    def model(q, k, v, ids):
        q = (q * 2).sin()
        ids.add_(1)
        q = q.cos()
        return flex_attention(q, k, v, hiding(causal_documents(ids)), enable_gqa=True)

    torch._dynamo.register_backend(name="inspect_places")(inspect)
    compiled(model, inner_backend="inspect_places")(*inputs(requires_grad=False), packed(0))
    names = [getattr(target, "__name__", target) for target in seen]
    place = seen.index(ops.list_tiles)
    assert "sin" in names[:place] or "call_method" in names[:place]
    assert names[place - 1] in ("add_", "iadd", "call_method")
    assert place < seen.index(ops.attention) - 1


def test_the_list_is_written_once_and_nothing_else():
    counted = collections.Counter()

    def inspect(graph_module, example_inputs):
        counted.update(n.target for n in graph_module.graph.nodes if n.target in (ops.list_tiles, ops.check_block_mask))
        return graph_module

    def layers(q, k, v, mask):
        for _ in range(3):
            q = attend(q, k, v, mask)
        return q

    torch._dynamo.register_backend(name="inspect_tile_lists")(inspect)
    compiled(layers, inner_backend="inspect_tile_lists")(*inputs(requires_grad=False), mask_of(packed(0)))
    assert counted == {ops.list_tiles: 1}


def test_a_write_between_two_calls_gives_the_second_a_list_of_its_own(made):
    def model(q, k, v, ids, new):
        first = flex_attention(q, k, v, hiding(causal_documents(ids)), enable_gqa=True)
        ids.copy_(new)
        return first, flex_attention(q, k, v, hiding(causal_documents(ids)), enable_gqa=True)

    qkv, one, other = inputs(requires_grad=False), packed(0), packed(1)
    found = compiled(model)(*qkv, one.clone(), other)
    for out, ids in zip(found, (one, other), strict=True):
        assert torch.equal(out, compiled(model)(*qkv, ids.clone(), other)[0])
    assert len(made) >= 2


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_inductor_calls_the_op(inner, made):
    call, qkv, mask = compiled(lambda *a: 2 * attend(*a), inner_backend=inner), inputs(), mask_of(packed(0))
    for _ in range(3):
        out = call(*qkv, mask)
        torch.autograd.grad(out.sum(), qkv)
    assert len(made) == 1
