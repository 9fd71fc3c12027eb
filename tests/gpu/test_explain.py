"""What explain says of plans on the GPU: certified errors, also of stored ones, and the mask of captured tensors."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import cache_clear, configure, explain
from cudnn_flex_compile.bench.mods import causal, softcap

OPTIONS = {"inner_backend": "aot_eager", "lower": "always"}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    cache_clear()
    torch.manual_seed(0)


def draw(requires_grad):
    return torch.randn(2, 4, 2048, 64, device="cuda", dtype=torch.bfloat16, requires_grad=requires_grad)


def call_of(requires_grad=True, **options):
    mask = create_block_mask(causal, None, None, 2048, 2048)
    report = explain(
        lambda q: flex_attention(q, q, q, softcap(20.0), mask), draw(requires_grad), options={**OPTIONS, **options}
    )
    assert len(report.lowered) == 1, str(report)
    return report.lowered[0]


@pytest.mark.parametrize(("requires_grad", "names"), [(False, ["out"]), (True, ["out", "dQ", "dK", "dV"])])
def test_errors_are_shown(requires_grad, names):
    call = call_of(requires_grad)
    assert [error.name for error in call.errors] == names
    for error in call.errors:
        assert 0 < error.found < 3 * error.stock < 0.05
    assert call.expected > 1


def test_errors_of_stored_plans(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDNN_FLEX_CACHE")
    configure(cache_dir=tmp_path)
    first = call_of()
    cache_clear()
    second = call_of()
    assert first.errors == second.errors != ()


def test_the_mask_of_captured_tensors():
    documents = torch.arange(2048, device="cuda") // 300

    def mask_mod(b, h, q, kv):
        return documents[q] == documents[kv]

    mask = create_block_mask(mask_mod, None, None, 2048, 2048)
    call = explain(lambda q: flex_attention(q, q, q, block_mask=mask), draw(False), options=OPTIONS).calls[0]
    assert call.picture.lines()[0][:3] == "███"
    assert call.picture.lines()[-1] == "·" * 28 + call.picture.lines()[-1][28:]
