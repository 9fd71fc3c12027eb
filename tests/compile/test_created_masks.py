"""BlockMasks that the compiled function makes itself, of the mask_mod of its calls: they are dead code.

Nothing in the graphs that the inner backend gets, forward and backward, has the size of all pairs. Where the blocks may
be others than the mask_mod's, they are compared, or honoured.
"""

import re
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from cudnn_flex_compile import ops
from cudnn_flex_compile.kernels import tile_lists
from cudnn_flex_compile.passes.read import created_masks
from cudnn_flex_compile.passes.read.call import find_calls
from cudnn_flex_compile.passes.read.effects import Writers
from cudnn_flex_compile.passes.write import tile_lists as write_lists
from cudnn_flex_compile.report.report import collect
from tests.compile.test_backend import close

LENGTH, HEADS = 256, 2
PAIRS = LENGTH * LENGTH


def causal(b, h, q, kv):
    return q >= kv


def window(b, h, q, kv):
    return q - kv <= 100


def documents(ids):
    return lambda b, h, q, kv: (ids[b, q] == ids[b, kv]) & (q >= kv)


def by_offsets(offsets):
    """The ids of documents, from where each begins."""
    return torch.searchsorted(offsets, torch.arange(LENGTH), right=True)[None]


def created(mask_mod, batch=None, heads=None, length=LENGTH, **how):
    return create_block_mask(mask_mod, batch, heads, length, length, device="cpu", **how)


@pytest.fixture(autouse=True)
def alone(trainable):
    """A fresh Dynamo, in which flex_attention trains on the CPU."""


@pytest.fixture
def lists(monkeypatch):
    """As if there were kernels by tile lists for the CPU."""
    monkeypatch.setattr(write_lists, "unusable", lambda device: None)
    tile_lists._known.clear()


_seen = []


def _see(graph_module, _):
    _seen.append(graph_module)
    return make_boxed_func(graph_module.forward)


torch._dynamo.register_backend(name="see_graphs")(aot_autograd(fw_compiler=_see, bw_compiler=_see))


@pytest.fixture
def graphs():
    """The ATen graphs of whatever is compiled with the inner backend `see_graphs`."""
    _seen.clear()
    return _seen


def inputs(batch=1, dim=16):
    return [torch.randn(batch, HEADS, LENGTH, dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


def compiled(function, inner="see_graphs", **options):
    options = {"inner_backend": inner, "lower": "always", **options}
    return torch.compile(function, backend="cudnn_flex", dynamic=False, options=options)


def largest(graph_module):
    """The elements of the largest tensor of a graph."""
    values = [n.meta.get("val") for n in graph_module.graph.nodes]
    return max(v.numel() for v in values if isinstance(v, torch.Tensor))


def of_pairs(graphs):
    """How many tensors of each graph have the size of all pairs."""
    values = [[n.meta.get("val") for n in g.graph.nodes] for g in graphs]
    return [sum(isinstance(v, torch.Tensor) and v.numel() >= PAIRS for v in some) for some in values]


def checks(graphs):
    return sum(n.target is ops.check_block_mask for g in graphs for n in g.graph.nodes)


def layers(mask_of):
    def model(q, k, v, *captured):
        mask = mask_of(*captured)
        for _ in range(2):
            q = flex_attention(q, k, v, block_mask=mask)
        return q

    return model


MASKS = {
    "causal": lambda _: created(causal),
    "causal, for each batch entry and head": lambda _: created(causal, 1, HEADS, BLOCK_SIZE=64),
    "causal and window": lambda _: created(and_masks(causal, window), BLOCK_SIZE=(128, 64)),
    "a length": lambda offsets: created(lambda b, h, q, kv: (kv < offsets[0]) & (q >= kv)),
    "nothing masked": lambda _: created(lambda b, h, q, kv: q >= 0),
}
OFFSETS = torch.tensor([70, 130, 200])


@pytest.mark.parametrize("name", MASKS)
def test_plans_that_know_the_mask_need_no_blocks(graphs, name):
    model, given = layers(MASKS[name]), inputs()
    with collect() as report:
        out = compiled(model)(*given, OFFSETS)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, given, grad)
    assert report.kept == []
    assert len(graphs) == 2
    assert of_pairs(graphs) == [0, 0]
    assert checks(graphs) == 0
    expected = model(*given, OFFSETS)
    close(out, expected)
    for mine, right in zip(found, torch.autograd.grad(expected, given, grad), strict=True):
        close(mine, right)


def test_documents_by_offsets_make_nothing_of_the_size_of_all_pairs(graphs, lists):
    model, given = layers(lambda offsets: created(documents(by_offsets(offsets)), 1)), inputs()
    with collect() as report:
        out = compiled(model)(*given, OFFSETS)
    out.sum().backward()
    assert [call.strategies for call in report.calls] == [("tile_lists",)] * 2
    assert of_pairs(graphs) == [0, 0]
    assert max(map(largest, graphs)) == given[0].numel()
    for offsets in (OFFSETS, torch.tensor([1, 2, 255])):
        close(compiled(model)(*given, offsets), model(*given, offsets))


def attend_of_the_page():
    """The function in docs/tile-lists.md."""
    page = (Path(__file__).parents[2] / "docs" / "tile-lists.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(code, names)  # our own file
    return names["attend"]


def test_the_page_about_documents_makes_nothing_of_the_size_of_all_pairs(graphs, lists):
    function = attend_of_the_page()
    length, offsets = 1024, torch.tensor([0, 300, 640, 1000])
    given = [torch.randn(1, 1, length, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    attend = compiled(function)
    with collect() as report:
        out = attend(*given, offsets)
    out.sum().backward()
    assert [call.strategies for call in report.calls] == [("tile_lists",)] * 2
    assert len(graphs) == 2
    assert max(map(largest, graphs)) == given[0].numel()
    close(out, function(*given, offsets))


def test_no_gradients(graphs, lists):
    model = layers(lambda offsets: created(documents(by_offsets(offsets)), 1))
    with torch.no_grad():
        compiled(model)(*inputs(), OFFSETS)
    assert of_pairs(graphs) == [0]


def test_checkpointed_layers(graphs, lists):
    def layer(q, k, v, mask):
        return q + flex_attention(q, k, v, block_mask=mask)

    def model(q, k, v, offsets):
        mask = created(documents(by_offsets(offsets)), 1)
        for _ in range(2):
            q = checkpoint(layer, q, k, v, mask, use_reentrant=False)
        return q

    given = inputs()
    with collect() as report:
        out = compiled(model)(*given, OFFSETS)
    out.sum().backward()
    assert [call.strategies for call in report.calls] == [("tile_lists",)] * 2
    assert of_pairs(graphs) == [0, 0]
    close(out, model(*given, OFFSETS))


def test_a_checkpointed_layer_that_writes_to_what_its_mask_reads(lists):
    def layer(q, k, v, mask, ids):
        ids.zero_()
        return q + flex_attention(q, k, v, block_mask=mask)

    def model(q, k, v, ids):
        mask = created(documents(ids), 1)
        return checkpoint(layer, q, k, v, mask, ids, use_reentrant=False)

    given, ids = inputs(), by_offsets(OFFSETS)
    with torch.no_grad():
        close(compiled(model, "aot_eager")(*given, ids.clone()), model(*given, ids.clone()))


def _two_masks(offsets):
    ids = by_offsets(offsets)
    return created(documents(ids), 1), created(documents(ids + 1), 1)


def test_a_kept_call_has_its_blocks(graphs, lists):
    def model(q, k, v, offsets):
        one, other = _two_masks(offsets)
        q = flex_attention(q, k, v, block_mask=one)
        return flex_attention(q, k, v, lambda s, *_: torch.special.i0(s), block_mask=other)

    given = inputs()
    with collect() as report, torch.no_grad():
        compiled(model, "eager")(*given, OFFSETS)
        compiled(model)(*given, OFFSETS)
    assert [call.reason is None for call in report.calls] == [True, False] * 2


OTHERS = {
    "of another mask_mod": lambda ids: _given(created(documents(ids), 1), causal),
    "of other ids": lambda ids: _given(created(documents(ids), 1), documents(ids // 2)),
    "a block fewer": lambda ids: _edited(created(causal)),
    "written to in place": lambda ids: _written(created(causal)),
    "of a captured tensor that is written to afterwards": lambda ids: _then(created(documents(ids), 1), ids.zero_),
    "for another length": lambda ids: created(causal, length=2 * LENGTH)._adjust(LENGTH, LENGTH),
    "of the blocks of another": lambda ids: _blocks_of(created(causal), window),
}


def _given(mask, mask_mod):
    mask.mask_mod = mask_mod
    return mask


def _with_the_blocks_of(mask, mask_mod):
    blocks = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    blocks += (mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices)
    return BlockMask(mask.seq_lengths, *blocks, BLOCK_SIZE=mask.BLOCK_SIZE, mask_mod=mask_mod)


def _edited(mask):
    mask.kv_num_blocks = (mask.kv_num_blocks - 1).clamp(min=0)
    return mask


def _written(mask):
    mask.kv_num_blocks.clamp_(max=0)
    return mask


def _then(mask, write):
    write()
    return mask


def _blocks_of(mask, mask_mod):
    other = created(mask_mod)
    other.kv_num_blocks, other.kv_indices = mask.kv_num_blocks, mask.kv_indices
    return other


@pytest.mark.parametrize("name", OTHERS)
def test_blocks_that_may_be_others_are_compared(monkeypatch, name):
    asked = []

    def judge(*given, judge=created_masks.created_here):
        asked.append(judge(*given))
        return asked[-1]

    monkeypatch.setattr(created_masks, "created_here", judge)
    model, given = layers(OTHERS[name]), inputs()
    ids = by_offsets(OFFSETS)
    with torch.no_grad():
        compiled(model, "aot_eager")(*given, ids.clone())
    assert asked
    assert not any(asked)


def test_a_mask_of_one_batch_entry_does_not_stand_for_all(monkeypatch):
    ids = torch.cat([by_offsets(OFFSETS), by_offsets(OFFSETS - 50)])
    for batch, agrees in ((None, False), (1, False), (2, True)):
        asked = []
        judge = created_masks.created_here

        def record(*given, asked=asked, judge=judge):
            asked.append(judge(*given))
            return asked[-1]

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(created_masks, "created_here", record)
            torch._dynamo.reset()
            compiled(layers(lambda ids, batch=batch: created(documents(ids), batch)), "aot_eager")(*inputs(2), ids)
        assert asked
        assert set(asked) == {agrees}


MODS = {
    "causal": lambda ids: causal,
    "window": lambda ids: window,
    "both": lambda ids: and_masks(causal, window),
    "both, turned": lambda ids: and_masks(window, causal),
    "documents": lambda ids: documents(ids[0]),
    "documents of others": lambda ids: documents(ids[1]),
    "the first id": lambda ids: lambda b, h, q, kv: ids[0][0, 0] > kv,
    "the second id": lambda ids: lambda b, h, q, kv: ids[0][0, 1] > kv,
    "strict": lambda ids: lambda b, h, q, kv: q > kv,
    "of heads": lambda ids: lambda b, h, q, kv: q - kv <= 50 * h,
}


@pytest.mark.parametrize("made", MODS)
def test_only_the_same_function_agrees(made):
    """The pass is asked about a BlockMask that is made of one function and called with each."""
    asked = []

    def model(q, k, v, *ids):
        mask = created(MODS[made](ids), 1, HEADS)
        return [flex_attention(q, k, v, block_mask=_with_the_blocks_of(mask, called(ids))) for called in MODS.values()]

    def backend(graph_module, example_inputs):
        writers = Writers(graph_module)
        asked.extend(created_masks.created_here(call, True, True, writers) for call in find_calls(graph_module))
        return lambda *_: [example_inputs[0]] * len(MODS)

    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=False)(*inputs(), by_offsets(OFFSETS), by_offsets(OFFSETS))
    assert asked == [made == called for called in MODS]


def test_an_error_within_vmap_leaves_no_level_open(monkeypatch):
    """The nodes of the graph are run, and one of them fails between the opening and the closing of a level."""
    levels, asked = [], []

    def broken(*args):
        levels.append(torch._C._functorch.maybe_current_level())
        raise RuntimeError("made up")

    def with_error(nodes, making, within=created_masks._with_vmaps):
        found = within(nodes, making)
        for node in found:
            if node.target == "ge":
                node.target, node.op = broken, "call_function"
        return found

    monkeypatch.setattr(created_masks, "_with_vmaps", with_error)

    def backend(graph_module, example_inputs):
        (call,) = find_calls(graph_module)
        asked.append(created_masks.created_here(call, False, False, Writers(graph_module)))
        return lambda *_: [example_inputs[0]]

    def model(q, k, v):
        return flex_attention(q, k, v, block_mask=created(causal))

    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=False)(*inputs())
    assert asked == [False]
    assert levels == [4]
    assert torch._C._functorch.maybe_current_level() is None
