"""One graph for several shapes (`is_override_shape_enabled`): why each new shape gets a plan of its own.

cuDNN accepts forwards of all kinds, and no backward. The day it accepts backwards, this fails: a plan could then be
executed at other shapes (CONTRIBUTING.md, "Shapes that change"), each of which would be certified as now.
"""

import pytest

from cudnn_flex_compile.bench.mods import causal, softcap
from cudnn_flex_compile.engine.graph.build import assemble
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.engine.versions import cudnn_version

from .accepted import lowerings, problem, program_of
from .harness import judge

SINCE = 92100  # older ones do not know the attribute
MODS = {"plain": (None, None), "causal": (None, causal), "soft cap + causal": (softcap(20.0), causal)}


def verdict(asked, lowering, sm, **how):
    built = []

    def build(device):
        built.append(assemble(asked, lowering, **device, **how))
        return built[-1].graph

    found = judge(build, sm)
    built[-1].callbacks.clear()
    return found


@pytest.mark.parametrize("sm", [90, 100])
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("name", MODS)
def test_forwards_alone(name, direction, sm):
    if cudnn_version() < SINCE:
        pytest.skip(f"cuDNN {cudnn_version()}")
    program = program_of(*MODS[name])
    for lowering in lowerings(program):
        asked = problem(program, direction)
        assert verdict(asked, lowering, sm) is None
        refusal = verdict(asked, lowering, sm, is_override_shape_enabled=True)
        if direction == FORWARD:
            assert refusal is None
        else:
            assert "does not support override shape" in refusal
