"""The regret of the chooser, measured on the GPU, on calls that take a moment: who runs, and who says why not."""

import contextlib

import pytest
import torch

from cudnn_flex_compile.bench.case import STOCK, Case, Shape
from cudnn_flex_compile.bench.regret import worker
from cudnn_flex_compile.bench.regret.result import DEFAULT


@pytest.mark.parametrize("training", [True, False])
def test_contenders_are_measured(tmp_path, training):
    torch._dynamo.reset()
    shape, told = Shape(1, 4, 2, 256 if training else 4, 64, 1024), {}
    plain = "causal" if training else "full"
    cases = {mod: Case(mod, shape, training=training) for mod in (plain, "soft cap")}
    worker.measure(cases, 3, contextlib.nullcontext, tmp_path, lambda name, found: told.update({name: found}))
    for mod, found in told.items():
        assert not isinstance(found, str), found
        measured = {name for name, contender in found.contenders.items() if contender.milliseconds > 0}
        assert {DEFAULT, STOCK, "graphs"} <= measured, found
        assert all(contender.why for name, contender in found.contenders.items() if name not in measured), found
        assert ("native" in measured) <= (mod == plain)
        assert found.regret >= 1
        assert found.contenders["graphs"].predicted > 0
