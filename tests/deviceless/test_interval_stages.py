"""The stages that list tiles, and the kernels, take the tensors that we give them: the frontend's compiler judges.

Without a GPU nothing runs; the compiler wants to know for which one it compiles, before it is imported.
"""

import os
import subprocess
import sys
from importlib import util

import pytest

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


@pytest.mark.skipif(not (util.find_spec("cutlass") and util.find_spec("tvm_ffi")), reason="no CuTe DSL")
def test_stages_compile():
    there = {**os.environ, "FLEX_ATTENTION_ARCH": "90", "CUTE_DSL_ARCH": "sm_90a"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=there, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [line.split(" ", 1)[1] for line in done.stdout.splitlines() if line.startswith("compiled ")]
    training = ["init", "classify", "k classify", "count", "scan", "write", "k write"]
    assert compiled == [*training, "init", "classify", "scan", "write"]
