"""How trainers launch flex_attention, each by stock and under install(): what Dynamo compiled, the calls, gradients.

Knows nothing of sizes that are real: benchmarks have these (cudnn_flex_compile/bench/rows).
"""

import contextlib
import copy
import dataclasses
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch._dynamo.pgo import reset_code_state
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as stock

from cudnn_flex_compile import collect, install
from cudnn_flex_compile.bench.rows.launch import OURS, STOCK, Side, block_masks
from cudnn_flex_compile.bench.rows.layers import Model
from cudnn_flex_compile.bench.rows.measure import Bench, Contender
from cudnn_flex_compile.bench.rows.row import Row
from cudnn_flex_compile.bench.rows.rows import chosen
from cudnn_flex_compile.report.report import Report
from tests.support.uncompiled import uncompiled

STEPS = 3  # each with masks of its own
SLACK = 1e-3  # of the norm
FORMS = {"alone": "1a", "blocks": "1b", "layers": "4a", "disabled": "5", "whole": "9b"}  # the row that has it
CALLS = {"alone": 1, "blocks": 1, "disabled": 1, "layers": 4, "whole": 2}  # that are compiled, of two layers


@dataclass(slots=True)
class Observed:
    """What one side did. graphs: that Dynamo compiled, so that a recompile is one more."""

    graphs: int
    breaks: dict[str, int]
    report: Report
    found: dict[str, torch.Tensor]


def row_of(form: str, device: str) -> Row:
    """For a GPU heads are real, and lengths of 2048 stand for all; before them comes another."""
    (row,) = (row for row in chosen([FORMS[form]]) if row.name == FORMS[form])
    if device == "cpu":
        return row.tiny()
    sizes = {"length": 2048, "dim": 512, "mlp": 1024, "batch": min(row.batch, 2)}
    return dataclasses.replace(row, **sizes, before=(1, 1024) if row.before else None)


def run(bench: Bench, name: str) -> Observed:
    """A fresh Dynamo compiles the model, and trains it for some steps; output and gradients of the last one."""
    torch._dynamo.reset()
    reset_code_state()
    counters.clear()
    options = {} if name == STOCK else bench.options
    contender = Contender(bench.row, bench.model(), Side(name, options, bench.device != "cpu"), bench.trains)
    inputs = [*bench.before(), *(bench.inputs(seed) for seed in range(STEPS))]
    with collect() as report:
        for given in inputs:
            with contender.backend.compiling():
                found = contender.step(*given)
    return Observed(counters["stats"]["unique_graphs"], dict(counters["graph_break"]), report, found)


def exact(bench: Bench) -> dict[str, torch.Tensor]:
    """Output and gradients of the last step, in float64."""
    model = bench.model().double()
    assert isinstance(model, Model)
    x, data, grad = bench.inputs(STEPS - 1)
    x = x.double().requires_grad_()
    with uncompiled():
        out = model(x, block_masks(bench.row, x, data))
        out.backward(grad.double())
    return {"out": out.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def assert_as_exact_as_stock(ours, theirs, wanted):
    """No output or gradient is further from float64's than twice stock's."""
    for name, value in wanted.items():
        off, allowed = ((side[name].double() - value).norm() for side in (ours, theirs))
        limit = 2 * allowed + SLACK * value.norm()
        assert off <= limit, f"{name}: off by {off / value.norm():.2e}, stock by {allowed / value.norm():.2e}"


def check_form(form: str, device: str, layers: int = 2):
    """All calls are found and lowered, Dynamo compiles as often as for stock, and numbers are as exact."""
    bench = Bench(row_of(form, device), layers, device, {"lower": "always"}, trains=True)
    with patch("cudnn_flex_compile.bench.rows.measure.of_transformers", lambda *_: None):
        theirs, ours = run(bench, STOCK), run(bench, OURS)
        wanted = exact(bench)
    assert not theirs.report.calls
    assert ours.report.kept == []
    assert len(ours.report.lowered) == (CALLS[form] * layers + 1) // 2
    assert ours.graphs
    assert (ours.graphs, ours.breaks) == (theirs.graphs, theirs.breaks)
    assert ours.found.keys() == theirs.found.keys() == wanted.keys()
    assert_as_exact_as_stock(ours.found, theirs.found, wanted)


def check_huggingface(device: str):
    """transformers compiles flex_attention by itself for a model that is eager."""
    import transformers.integrations.flex_attention as integration

    from examples.huggingface import make_inputs, make_model

    model = make_model("llama", "tiny", device)
    inputs = make_inputs(model, "right", 2, 160)

    def step(wanted: torch.nn.Module) -> tuple[dict[str, torch.Tensor], Report]:
        torch._dynamo.reset()
        integration.WrappedFlexAttention._is_flex_compiled = False
        with collect() as report:
            for _ in range(2):
                wanted.zero_grad()
                result = wanted(**inputs)
                result.loss.backward()
        return {"loss": result.loss.detach(), **{n: p.grad.clone() for n, p in wanted.named_parameters()}}, report

    with install(lower="always"):
        ours, report = step(model)
    assert (len(report.lowered), report.kept) == (1, [])
    eager = patch.object(integration.WrappedFlexAttention, "__call__", lambda self: stock.flex_attention)
    with eager if device == "cpu" else contextlib.nullcontext():  # Inductor has no backward there
        theirs, report = step(model)
    assert not report.calls
    with eager, uncompiled():
        wanted, _ = step(copy.deepcopy(model).double())
    assert_as_exact_as_stock(ours, theirs, wanted)
