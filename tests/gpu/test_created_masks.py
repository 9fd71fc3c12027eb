"""BlockMasks that the compiled function makes itself, on a GPU: right, and without memory of the size of all pairs."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile.engine.tiles.frontend import kernels_missing
from cudnn_flex_compile.passes.read import created_masks
from cudnn_flex_compile.report.report import collect
from tests.compile.test_created_masks import attend_of_the_page, causal, documents, window

LENGTH, HEADS, DIM = 1024, 4, 64
NINETY = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.fixture
def asked(monkeypatch):
    """The answers of the proof, in order."""
    found = []

    def judge(*given, judge=created_masks.created_here):
        found.append(judge(*given))
        return found[-1]

    monkeypatch.setattr(created_masks, "created_here", judge)
    torch._dynamo.reset()
    return found


def inputs(length):
    shape = (1, HEADS, length, DIM)
    return [torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3)]


def with_gradients(function, given, offsets, grad):
    out = function(*given, offsets)
    return out, *torch.autograd.grad(out, given, grad)


MASKS = {
    "causal": lambda offsets: causal,
    "window": lambda offsets: window,
    "documents": lambda offsets: documents(
        torch.searchsorted(offsets, torch.arange(LENGTH, device="cuda"), right=True)[None]
    ),
    "a length": lambda offsets: lambda b, h, q, kv: (kv < offsets[2]) & (q >= kv),
}


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_made_in_the_graph_is_known_to_agree(asked, name, device):
    def model(q, k, v, offsets):
        mask = create_block_mask(MASKS[name](offsets), None, None, LENGTH, LENGTH, device=device)
        return flex_attention(q, k, v, block_mask=mask)

    torch.manual_seed(0)
    given, offsets = inputs(LENGTH), torch.tensor([0, 100, 700], device="cuda")
    grad = torch.randn_like(given[0])
    ours = torch.compile(model, backend="cudnn_flex", dynamic=False, options={"lower": "always"})
    with collect() as report:
        found = with_gradients(ours, given, offsets, grad)
    assert report.kept == []
    assert asked == [True]
    stock = with_gradients(torch.compile(model, dynamic=False), given, offsets, grad)
    for mine, theirs in zip(found, stock, strict=True):
        assert (mine.float() - theirs.float()).norm() <= 0.02 * theirs.float().norm()


@pytest.mark.skipif(not NINETY or kernels_missing() is not None, reason="no interval kernels here")
@pytest.mark.parametrize("length", [32768, 131072])
def test_documents_by_offsets_take_no_memory_of_the_size_of_all_pairs(asked, length):
    given, offsets = inputs(length), torch.arange(0, length, 4096, device="cuda")
    ours = torch.compile(attend_of_the_page(), backend="cudnn_flex", dynamic=False, options={"lower": "always"})
    with collect() as report:
        ours(*given, offsets).sum().backward()  # builds and checks the plans, which takes more
    assert [call.strategies for call in report.calls] == [("tile_lists", "tile_lists")] * 2
    assert set(asked) == {True}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours(*given, offsets).sum().backward()
    torch.cuda.synchronize()
    room = torch.cuda.max_memory_allocated() - before
    tensor = given[0].numel() * given[0].itemsize
    assert room <= 40 * tensor
    assert room < length * length / 2
