"""Packed documents and other masks of few intervals a row, end to end on the CPU: graphs, numbers, BlockMasks."""

import collections

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import ops
from cudnn_flex_compile.config import Options
from cudnn_flex_compile.kernels import tile_lists
from cudnn_flex_compile.passes import contenders
from cudnn_flex_compile.passes.write import tile_lists as write_lists
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.report.report import collect
from tests.support import dense
from tests.support.any_block_masks import as_mask_mod
from tests.support.fastest import KEPT, make_fastest

BATCH, HEADS, LENGTH, DIM = 2, 4, 96, 16


@pytest.fixture(autouse=True)
def on_cpu(trainable, monkeypatch):
    """As if there were kernels by tile lists for the CPU; setting up takes no time there."""
    monkeypatch.setattr(write_lists, "unusable", lambda device: None)


@pytest.fixture
def lists(monkeypatch):
    """The geometry of each list that is made."""
    made = []

    def handle(listed, device, make=tile_lists._handle):
        made.append(listed.geometry)
        return make(listed, device)

    monkeypatch.setattr(tile_lists, "_handle", handle)
    tile_lists._known.clear()
    return made


def causal_documents(ids):
    return lambda b, h, q, kv: (ids[b, q] == ids[b, kv]) & (q >= kv)


def packed(seed, count=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, count, (BATCH, LENGTH), generator=generator).sort(-1).values


def inputs(requires_grad=True):
    shapes = [(BATCH, LENGTH, heads, DIM) for heads in (HEADS, 2, 2)]
    return [torch.randn(s).bfloat16().transpose(1, 2).detach().requires_grad_(requires_grad) for s in shapes]


def hiding(mask):
    """A mask without a BlockMask."""
    return lambda score, b, h, q, kv: torch.where(mask(b, h, q, kv), score, -torch.inf)


def attend(q, k, v, ids):
    return flex_attention(q, k, v, hiding(causal_documents(ids)), enable_gqa=True)


def compiled(function, **options):
    given = {"inner_backend": "aot_eager", "lower": "always", "tile_lists": True, **options}
    return torch.compile(function, backend="cudnn_flex", dynamic=False, options=given)


def assert_right(function, ids, *rest):
    qkv = inputs()
    out = function(*qkv, ids, *rest)
    grad = torch.randn_like(out)
    found = (out.detach(), *torch.autograd.grad(out, qkv, grad))
    mask = causal_documents(ids)
    exact, stock = (dense.with_gradients(*qkv, None, mask, DIM**-0.5, grad, flag) for flag in (True, False))
    for mine, right, theirs in zip(found, (exact[0], *exact[2:]), (stock[0], *stock[2:]), strict=True):
        allowed = 2 * (theirs.double() - right).norm() + 1e-3 * right.norm()
        assert (mine.double() - right).norm() <= allowed


def test_new_documents_every_step_make_a_new_list_and_no_new_graph(lists):
    function = compiled(attend)
    with collect() as report:
        for seed in range(4):
            assert_right(function, packed(seed))
    assert [call.strategies for call in report.calls] == [("tile_lists",)]
    assert len(lists) == 4


def test_ids_in_no_order_are_right():
    function = compiled(attend)
    assert_right(function, packed(0))
    generator = torch.Generator().manual_seed(0)
    assert_right(function, torch.randint(0, 3, (BATCH, LENGTH), generator=generator))


def test_layers_share_one_list(lists):
    def layers(q, k, v, ids):
        for _ in range(3):
            q = q + attend(q, k, v, ids)
        return q

    with collect() as report:
        out = compiled(layers)(*inputs(), packed(1))
    out.sum().backward()
    assert [call.strategies for call in report.calls] == [("tile_lists",)] * 3
    assert len(lists) == 1


def test_a_block_mask_is_checked_with_the_list(lists):
    def with_mask(q, k, v, ids, mask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    def mask_of(ids):
        return create_block_mask(causal_documents(ids), BATCH, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=32)

    function = compiled(with_mask)
    with collect() as report:
        for seed in range(3):
            ids = packed(seed)
            assert_right(function, ids, mask_of(ids))
    assert [call.strategies for call in report.calls] == [("tile_lists",)]
    assert len(lists) == 3
    many, one = packed(7, 24), torch.zeros_like(packed(7))
    other = mask_of(many)
    other.mask_mod = causal_documents(one)
    given = inputs()
    seen = create_block_mask(as_mask_mod(other), BATCH, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=32)
    found, expected = function(*given, one, other), with_mask(*given, one, seen)
    assert (found - expected).norm() <= 2**-6 * expected.norm()


def test_checkpointed_layers(lists):
    def layer(q, k, v, ids):
        return q + attend(q, k, v, ids)

    def model(q, k, v, ids):
        return torch.utils.checkpoint.checkpoint(layer, q, k, v, ids, use_reentrant=False)

    with collect() as report:
        out = compiled(model)(*inputs(), packed(1))
    out.sum().backward()
    assert [call.strategies for call in report.calls] == [("tile_lists",)]
    assert lists


KEPT_AS_THEY_ARE = {
    "causal": lambda b, h, q, kv: q >= kv,
    "window": lambda b, h, q, kv: (q >= kv) & (q - kv <= 8),
    "every other": lambda b, h, q, kv: (q - kv) % 2 == 0,  # half of all keys are an interval each
}


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("name", KEPT_AS_THEY_ARE)
def test_other_masks_take_other_roads(name, blocks):
    mod = KEPT_AS_THEY_ARE[name]
    mask = create_block_mask(mod, None, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=32) if blocks else None

    def plain(q, k, v, mask):
        return flex_attention(q, k, v, None if blocks else hiding(mod), mask, enable_gqa=True)

    with collect() as report:
        compiled(plain)(*inputs(False), mask)
    assert report.calls[0].reason is None
    assert report.calls[0].strategies != ("tile_lists",)


def test_a_modified_score_takes_another_road():
    def capped(q, k, v, ids):
        mask = causal_documents(ids)
        return flex_attention(
            q, k, v, lambda s, b, h, i, j: torch.where(mask(b, h, i, j), torch.tanh(s), -torch.inf), enable_gqa=True
        )

    with collect() as report:
        compiled(capped)(*inputs(False), packed(0))
    assert report.calls[0].strategies == ("chained",)


def with_bias(q, k, v, ids, bias):
    mask = causal_documents(ids)

    def score_mod(score, b, h, i, j):
        return torch.where(mask(b, h, i, j), score + bias[h, i, j], -torch.inf)

    return flex_attention(q, k, v, score_mod, enable_gqa=True)


def test_a_learned_bias_takes_another_road(lists):
    ids, bias = packed(0), torch.randn(HEADS, LENGTH, LENGTH, requires_grad=True)
    given = inputs()
    with collect() as report:
        out = compiled(with_bias)(*given, ids, bias)
    assert report.calls[0].strategies == ("chained",)
    assert not lists
    out.sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (*given, bias)]
    with_bias(*exact[:3], ids, exact[3]).sum().backward()
    for found, right in zip((*given, bias), exact, strict=True):
        assert (found.grad.double() - right.grad).norm() <= 2e-2 * right.grad.norm()


def with_lse(q, k, v, ids):
    out, lse = flex_attention(q, k, v, hiding(causal_documents(ids)), enable_gqa=True, return_lse=True)
    return out.float().sum() + lse.sin().sum()


@pytest.mark.parametrize("right", [True, False])
def test_a_loss_of_the_lse_runs_by_intervals_only_if_that_is_certified(monkeypatch, lists, right):
    asked = []

    def judge(target, judge=contenders.plan_or_reason):
        asked.append((bool(target.tiled), target.lse_gradient))
        return judge(target) if right or not target.tiled else Reason(Code.CERTIFICATION, "of the LSE's gradient")

    monkeypatch.setattr(contenders, "plan_or_reason", judge)
    with collect() as report:
        compiled(with_lse)(*inputs(), packed(0))
    assert asked == [(True, True)] + [(False, True)] * (not right)
    assert report.calls[0].strategies == (("tile_lists",) if right else ("chained",))
    assert len(lists) == right


def test_what_plans_are_slower_for_is_tried_by_intervals(monkeypatch):
    def rows(q, k, v, ends):
        return flex_attention(q, k, v, hiding(lambda b, h, i, j: j < ends[b, i]), enable_gqa=True)

    given = (*inputs(False), torch.randint(1, LENGTH, (BATCH, LENGTH)))
    for winner, strategies in ((("forward",), ("tile_lists",)), ((), ("chained",)), (KEPT, ())):
        make_fastest(monkeypatch, winner)
        torch._dynamo.reset()
        with collect() as report:
            compiled(rows, lower="when_faster")(*given)
        assert report.calls[0].strategies == strategies
        assert report.calls[0].reason is None or report.calls[0].reason.code is Code.SLOWER


def test_no_intervals_under_cuda_graphs(monkeypatch):
    assert Options(mode="reduce-overhead").captures_graphs
    assert not Options().captures_graphs
    monkeypatch.setattr(Options, "captures_graphs", True)
    with collect() as report:
        compiled(attend)(*inputs(False), packed(0))
    assert report.calls[0].strategies == ("chained",)


def test_a_small_call_by_itself_is_kept():
    with collect() as report:
        compiled(attend, lower="when_faster")(*inputs(False), packed(0))
    assert report.calls[0].strategies == ("chained",)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(write_lists, "unusable", lambda device: Reason(Code.TILE_LISTS, "no cutlass"))
    make_fastest(monkeypatch, ("forward",), rest=8.0)
    with collect() as report:
        compiled(attend, lower="when_faster")(*inputs(False), packed(0))
    assert report.calls[0].reason == Reason(Code.TILE_LISTS, "no cutlass")
    assert "nvidia-cudnn-frontend" in report.calls[0].reason.remedy


def test_nothing_but_the_list_is_in_the_graph(lists):
    counted = collections.Counter()

    def inspect(graph_module, example_inputs):
        counted.update(n.target for n in graph_module.graph.nodes if n.target in (ops.list_tiles, ops.attention))
        return graph_module

    torch._dynamo.register_backend(name="inspect_documents")(inspect)
    compiled(attend, inner_backend="inspect_documents")(*inputs(False), packed(0))
    assert counted == {ops.list_tiles: 1, ops.attention: 1}
