"""Generated programs that write between calls, on the GPU: as eager, and calls share operands where nothing writes."""

import pytest
import torch
from torch.nn.attention import flex_attention

from tests.compile.test_backend import fresh
from tests.compile.test_writes import check, graphs, shared
from tests.support.written_programs import COUNT, program

__all__ = ["fresh", "graphs"]


@pytest.mark.parametrize("number", range(COUNT))
def test_generated(number, graphs, monkeypatch):
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # eager is eager
    report, drawn = check(number, "cuda", graphs), program(number)
    if report.kept:
        pytest.skip("; ".join(str(c.reason) for c in report.kept))
    assert torch.cuda.is_available()
    for reused, written in zip(shared(graphs), drawn.written, strict=True):
        assert not (reused and written)
        assert reused or written or len(graphs) > 1 or drawn.moves
