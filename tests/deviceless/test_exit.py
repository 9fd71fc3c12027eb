"""Graphs with score_mods are freed with their plans, and no plan that is alive at exit is complained about.

Knows nothing of execution. nanobind, which binds cuDNN's frontend, lists at exit what was never freed.
"""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from cudnn_flex_compile.bench.mods import causal, softcap
from cudnn_flex_compile.engine.graph import build
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD

from . import accepted
from .accepted import lowerings, problem, program_of, verdict

ROOT = Path(__file__).parents[2]

BUILD = """
from tests.deviceless import accepted
from tests.deviceless.harness import load_libraries
from cudnn_flex_compile.bench.mods import causal, softcap
load_libraries()
kept = []
def build(*given, **more):
    kept.append(assemble(*given, **more))
    return kept[-1]
assemble, accepted.assemble = accepted.assemble, build
program = accepted.program_of(softcap(20.0), causal)
for direction in ("forward", "backward"):
    for lowering in accepted.lowerings(program):
        assert accepted.verdict(accepted.problem(program, direction), lowering) is None
refused = accepted.program_of(lambda score, b, h, q, kv: score.relu())
assert accepted.verdict(accepted.problem(refused, "backward"), accepted.lowerings(refused)[0], 80) is not None
wide = accepted.problem(program, "backward", head_dim=136)
assert "no engine" in accepted.verdict(wide, accepted.lowerings(program)[0], 80)  # before it calls a callback
"""
ALIVE = """
from types import SimpleNamespace
from cudnn_flex_compile.engine.store.plan_cache import CachedPlan
from cudnn_flex_compile.engine.state import engine
import cudnn_flex_compile.kernels.cuda
for i, built in enumerate(kept):
    plan = SimpleNamespace(graph=built.graph, inputs=built.inputs, roles=built.roles)
    engine.plans.put(i, CachedPlan(plan, (False,) * 4))
    cudnn_flex_compile.kernels.cuda.keep_alive = plan  # as torch keeps the functions of ops, and what they refer to
"""


@pytest.mark.parametrize("alive", ["", ALIVE], ids=["freed before", "alive at exit"])
def test_nothing_is_left_at_exit(alive):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", BUILD + alive], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr, done.stderr[:500]


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_a_graph_goes_with_its_last_reference(direction, monkeypatch):
    """The lowered graph owns the callbacks: they live as long as it does."""

    class Callbacks(build.Callbacks):  # one that weak references take
        pass

    built, callbacks = [], []

    def recorded(*given, **more):
        built.append(build.assemble(*given, **more))
        callbacks.append(weakref.ref(built[-1].callbacks))
        return built[-1]

    monkeypatch.setattr(build, "Callbacks", Callbacks)
    monkeypatch.setattr(accepted, "assemble", recorded)
    program = program_of(softcap(20.0), causal)
    for lowering in lowerings(program):
        assert verdict(problem(program, direction), lowering) is None
    graphs = [each.graph for each in built]
    built.clear()
    gc.collect()
    assert [found() is None for found in callbacks] == [False, False]
    graphs.clear()
    gc.collect()
    assert [found() is None for found in callbacks] == [True, True]
