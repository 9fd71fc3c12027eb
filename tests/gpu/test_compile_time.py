"""On a GPU, with real plans and gradients: 48 equal layers build as many plans as one."""

import pytest
import torch

from cudnn_flex_compile import cache_clear
from cudnn_flex_compile.passes.read import programs
from cudnn_flex_compile.report.report import collect
from tests.support.layers import KINDS, inputs, model

OPTIONS = {"inner_backend": "aot_eager", "lower": "always"}


@pytest.mark.parametrize(("kinds", "distinct"), [(KINDS[:1], 1), (KINDS, 3)], ids=["equal", "three kinds"])
def test_plans_grow_with_distinct_programs(kinds, distinct):
    """Forward and backward each; a kind may take several trials, the same at any number of layers."""
    builds = []
    for layers in (distinct, 12, 48):
        torch._dynamo.reset()
        programs.clear()
        cache_clear()
        net = model([kinds[i % distinct] for i in range(layers)], 256, 64, "cuda")
        with collect() as report:
            torch.compile(net, backend="cudnn_flex", options=OPTIONS)(inputs(256, 64, "cuda")).sum().backward()
        report.assert_all_lowered()
        assert len(report.calls) == layers
        assert report.counts["programs traced"] == distinct
        report.assert_plans_built(at_least=2 * distinct, at_most=4 * distinct)
        builds.append(report.counts["builds"])
    assert builds[1:] == builds[:1] * 2
