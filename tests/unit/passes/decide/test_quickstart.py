"""examples/quickstart.py on an H200: every call is lowered in training at its size, by the table of times."""

import importlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cudnn_flex_compile.passes import contenders
from cudnn_flex_compile.passes.decide import cost_inputs, cost_model
from cudnn_flex_compile.passes.decide.chooser import STOCK, choose
from cudnn_flex_compile.passes.decide.cost_inputs import Blocks, CostInputs, Workload
from cudnn_flex_compile.passes.decide.device_times import FOLDER, read

EXAMPLES = Path(__file__).parents[4] / "examples"
BLOCK = 128


@pytest.fixture
def quickstart(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("quickstart")


@pytest.fixture
def calls(quickstart, monkeypatch):
    """What the rules are told of each call, at the size of a laptop."""
    found = []
    with monkeypatch.context() as patch, torch.no_grad():

        def chosen(inputs, *rest):
            found.append(inputs[()])
            return choose(inputs, *rest)

        patch.setattr(contenders, "choose", chosen)
        batch, heads, length, dim = quickstart.SMALL
        x = torch.randn(batch, length, heads * dim, dtype=torch.bfloat16)
        options = {"inner_backend": "aot_eager"}
        torch.compile(quickstart.make_model(), backend="cudnn_flex", options=options)(x)
    torch._dynamo.reset()
    return found


def at(size, call, partial, listed):
    """The same of the large size on a GPU: `partial` of the `listed` blocks of each row are partial, in training."""
    batch, heads, length, dim = size
    width, rows = heads * dim, length // BLOCK
    tensor = SimpleNamespace(shape=size, device=torch.device("cuda"), dtype=torch.bfloat16)
    products = Workload(products=8, tflop=4 * 8 * batch * length * width**2 / 1e12, calls=4)
    given = SimpleNamespace(query=tensor, key=tensor, value=tensor, blocks=("there",))
    blocks = Blocks(listed / rows, partial / listed)
    return CostInputs(given, call.program, call.hoisted, True, False, blocks, products)


def test_all_calls_are_lowered_on_an_h200(quickstart, calls, monkeypatch):
    times = read(FOLDER / "NVIDIA_H200.json")
    monkeypatch.setattr(cost_inputs, "times_of", lambda device: times)
    for module in (cost_inputs, cost_model):
        monkeypatch.setattr(module, "example", lambda node: node)
    causal = 1, (quickstart.LARGE[2] // BLOCK + 1) / 2
    assert len(calls) == len(quickstart.LAYERS)
    for layer, call, blocks in zip(quickstart.LAYERS, calls, (causal, (2, 2), causal, causal), strict=True):
        large = at(quickstart.LARGE, call, *blocks)
        found = choose({(): large}, True, None, False)
        assert found.order == ((),), (layer, found.slower)
        assert found.estimates[STOCK].total > 1.4 * found.estimates[()].total, layer
        tiny = replace(at((1, 1, *quickstart.LARGE[2:]), call, *blocks), training=False)
        assert not choose({(): tiny}, True, None, False).order, "the test can tell"
