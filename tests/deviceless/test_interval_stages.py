"""The stages that list tiles, and the kernels, take the tensors that we give them: the frontend's compiler judges.

Without a GPU nothing runs; the compiler wants to know for which one it compiles, before it is imported.
"""

import gc
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from importlib import util

import pytest
import torch

from cudnn_flex_compile.engine import tiles

SCRIPT = """
import torch
from torch._subclasses import FakeTensorMode
from cudnn_flex_compile.engine import tiles

def compile_only(self, stage, compiler, config, tensors, numbers=()):
    getattr(self._builder, compiler)(config, *tensors)
    print("compiled", stage)

tiles.Tiler._run = compile_only
tiles.Tiler._schedule = lambda self, draft: None
tiles.Tiler.views = lambda self, list: {
    name: list.as_strided(part.shape, part.strides, part.start).view(part.dtype) for name, part in self._parts.items()
}
with FakeTensorMode():
    for geometry in (
        tiles.Geometry(2, 16, 16, 4096, 4096, 128, 128, 1, True, torch.bfloat16),
        tiles.Geometry(1, 8, 2, 333, 200, 64, 64, 8, False, torch.float16),
    ):
        tiler = tiles.Tiler(geometry)
        table = torch.empty(geometry.mask_heads, 3, geometry.batch * geometry.rows, dtype=torch.int32, device="cuda")
        assert tiler.list(table).shape == (tiler.size,)
"""


pytestmark = pytest.mark.skipif(not (util.find_spec("cutlass") and util.find_spec("tvm_ffi")), reason="no CuTe DSL")


def test_stages_compile():
    there = {**os.environ, "FLEX_ATTENTION_ARCH": "90", "CUTE_DSL_ARCH": "sm_90a"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=there, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [line.split(" ", 1)[1] for line in done.stdout.splitlines() if line.startswith("compiled ")]
    training = ["init", "classify", "k classify", "count", "scan", "write", "k write"]
    assert compiled == [*training, "init", "classify", "scan", "write"]


@pytest.fixture
def geometry(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return tiles.Geometry(2, 16, 4, 256, 200, 128, 128, 1, True, torch.bfloat16)


def test_a_list_in_training_begins_as_one_without(geometry):
    """The forward's plan reads either."""
    training, forward = (tiles.Tiler(replace(geometry, training=flag)) for flag in (True, False))
    assert forward.size < training.size
    assert forward._parts == {name: training._parts[name] for name in forward._parts}
    parts = sorted(training._parts.values(), key=lambda part: part.start)
    assert all(one.end <= other.start for one, other in itertools.pairwise(parts))
    assert tiles.Geometry.of(geometry.numbers, geometry.dtype) == geometry


def test_views_are_made_once_a_list_and_go_with_it(geometry):
    tiler = tiles.Tiler(geometry)
    listed = torch.arange(tiler.size, dtype=torch.int32)
    views = tiler.views(listed)
    assert tiler.views(listed) is views
    assert int(views["k_offsets"][0]) == tiler._parts["k_offsets"].start
    assert views["masks"].dtype == torch.uint32
    known = len(tiles._known)
    del listed
    gc.collect()
    assert len(tiles._known) == known - 1
    assert int(views["k_offsets"][0]) == tiler._parts["k_offsets"].start  # the memory stays while a view is held
