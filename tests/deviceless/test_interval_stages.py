"""Lists of tiles without a GPU: the frontend's compiler judges the tensors that its stages get, and what torch does
between them is run with stages that count what they are told.

The compiler wants to know for which device it compiles, before it is imported.
"""

import collections
import contextlib
import gc
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from importlib import util

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cudnn_flex_compile.engine.tiles import recording as tile_recording
from cudnn_flex_compile.engine.tiles import tile_list

SCRIPT = """
import torch
from torch._subclasses import FakeTensorMode
from cudnn_flex_compile.engine.tiles import tile_list

def compile_only(self, stage, compiler, config, tensors, numbers):
    getattr(self._builder, compiler)(config, *tensors)
    print("compiled", stage)

tile_list.Tiler._run = compile_only
torch.Tensor.copy_ = lambda self, other: self  # wants a device
with FakeTensorMode():
    for geometry in (
        tile_list.Geometry(2, 16, 16, 4096, 4096, 128, 128, 1, True, torch.bfloat16),
        tile_list.Geometry(1, 8, 2, 333, 200, 64, 64, 8, False, torch.float16),
    ):
        tiler = tile_list.Tiler(geometry)
        table = torch.empty(geometry.mask_heads, 3, geometry.batch * geometry.rows, dtype=torch.int32, device="cuda")
        assert tiler.list(table).shape == (tiler.size,)
"""


pytestmark = pytest.mark.skipif(not (util.find_spec("cutlass") and util.find_spec("tvm_ffi")), reason="no CuTe DSL")


def test_stages_compile():
    there = {**os.environ, "FLEX_ATTENTION_ARCH": "90", "CUTE_DSL_ARCH": "sm_90a"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=there, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [line.split(" ", 1)[1] for line in done.stdout.splitlines() if line.startswith("compiled ")]
    backward, forward = ["k classify", "k count", "k write"], ["classify", "write"]
    assert compiled == [*backward, *forward, *forward]


@pytest.fixture
def geometry(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return tile_list.Geometry(2, 16, 4, 256, 200, 128, 128, 1, True, torch.bfloat16)


def test_a_list_in_training_begins_as_one_without(geometry):
    """The forward's plan reads either."""
    training, forward = (tile_list.Tiler(replace(geometry, training=flag)) for flag in (True, False))
    assert forward.size < training.size
    assert forward._list.parts == {name: training._list.parts[name] for name in forward._list.parts}
    within = [kind + name for kind in ("", "full_", "k_", "k_full_") for name in ("counts", "offsets")]
    for layout in (training._list, training._scratch):
        parts = sorted((p for name, p in layout.parts.items() if name not in within), key=lambda part: part.start)
        assert all(one.end <= other.start for one, other in itertools.pairwise(parts))
    assert tile_list.Geometry.of(geometry.numbers, geometry.dtype) == geometry


def test_views_are_made_once_a_list_and_go_with_it(geometry):
    tiler = tile_list.Tiler(geometry)
    listed = torch.arange(tiler.size, dtype=torch.int32)
    views = tiler.views(listed)
    assert tiler.views(listed) is views
    assert int(views["k_offsets"][0]) == tiler._list.parts["k_offsets"].start
    assert views["masks"].dtype == torch.uint32
    known = len(tile_list._known)
    del listed
    gc.collect()
    assert len(tile_list._known) == known - 1
    assert int(views["k_offsets"][0]) == tiler._list.parts["k_offsets"].start  # the memory stays while a view is held


@pytest.fixture
def counts(monkeypatch):
    """Stages that write random counts; a list of their names."""
    ran, generator = [], torch.Generator().manual_seed(0)

    def run(self, stage, compiler, config, tensors, numbers):
        ran.append(stage)
        for counts in {"classify": tensors[3:5], "k count": tensors[2:4]}.get(stage, ()):
            counts.copy_(torch.randint(0, 5, counts.shape, generator=generator))

    monkeypatch.setattr(tile_list.Tiler, "_run", run)
    return ran


GEOMETRIES = {  # batch, heads, kv heads, rows, columns, dim, value dim, heads of the mask
    "MHA": (2, 16, 16, 4096, 4096, 128, 128, 1), "L2 holds 2 of 6": (1, 6, 6, 1000, 40000, 128, 128, 1),
    "packed": (2, 16, 4, 333, 200, 128, 128, 1), "not packed": (1, 6, 2, 600, 600, 128, 128, 1),
    "a mask for each head": (2, 8, 2, 700, 512, 64, 64, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", GEOMETRIES)
def test_offsets_add_up_and_work_is_ordered(name, counts):
    tiler = tile_list.Tiler(tile_list.Geometry(*GEOMETRIES[name], True, torch.bfloat16))
    g, forward = tiler.geometry, tiler._forward
    table = torch.zeros(g.mask_heads, 3, g.batch * g.rows, dtype=torch.int32)
    draft = tiler.draft(table)
    for _ in range(2):  # memory that was used before
        tiler.fill(draft)
        v = draft.views
        for kind in ("", "full_", "k_", "k_full_"):
            assert v[f"{kind}offsets"].tolist() == [0, *itertools.accumulate(v[f"{kind}counts"].flatten().tolist())]
        packed = g.heads // g.kv_heads if forward.pack_gqa else 1
        blocks, tile = -(-g.rows * packed // forward.tile_m), forward.tile_m
        length = (v["counts"] + v["full_counts"]).view(g.mask_heads, g.batch, blocks)
        together = {"L2 holds 2 of 6": 2, "MHA": 16}.get(name)
        found = []
        for block, head, entry, rows in v["work"].tolist():
            assert rows == min(tile, g.rows * packed - block * tile)
            group = 0 if together is None else head // together
            found.append((entry, group, -int(length[head if g.mask_heads > 1 else 0, entry, block]), block, head))
        assert sorted((b, h, block) for b, _, _, block, h in found) == sorted(
            itertools.product(range(g.batch), range(g.heads // packed), range(blocks))
        )
        if g.mask_heads == 1:
            assert found == sorted(found)
    assert counts == ["k classify", "k count", "k write", "classify", "write"] * 2


class Counted(TorchDispatchMode):
    """The ops that would launch something."""

    def __init__(self):
        super().__init__()
        self.ops = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.ops[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    """Not on a GPU, nothing is recorded, and nothing replayed."""

    replays = 0

    def capture_begin(self, capture_error_mode):
        assert capture_error_mode == "thread_local"

    def capture_end(self):
        pass

    def replay(self):
        self.replays += 1


@pytest.fixture
def without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)


@pytest.mark.parametrize("inference", [False, True])
def test_a_recorded_list_is_three_launches(geometry, counts, without_cuda, inference):
    with torch.inference_mode(inference):
        recording = tile_recording.Recording(tile_list.Tiler(geometry), torch.device("cpu"))
    assert len(counts) == 2 * 5
    table = torch.full((1, 3, geometry.batch * geometry.rows), 7, dtype=torch.int32)
    with Counted() as counted:
        listed = recording.list(table)
    assert counted.ops == {"copy_": 1, "clone": 1}
    assert recording._graph.replays == 1
    assert len(counts) == 2 * 5
    assert torch.equal(recording._draft.table, table)
    assert listed.data_ptr() != recording._draft.tiles.data_ptr()


def test_few_ops_between_the_stages(geometry, monkeypatch):
    """They are recorded, but each is a node of the graph, which the device takes microseconds for."""
    monkeypatch.setattr(tile_list.Tiler, "_run", lambda *args: None)
    tiler = tile_list.Tiler(geometry)
    draft = tiler.draft(torch.zeros(1, 3, geometry.batch * geometry.rows, dtype=torch.int32))
    with Counted() as counted:
        tiler.fill(draft)
    assert counted.ops == {"zero_": 1, "cumsum": 2, "add": 1, "sort": 1, "copy_": 1}


def test_what_cuda_does_not_record_is_listed_without(geometry, monkeypatch, caplog):
    def refuse(tiler, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(tile_recording, "Recording", refuse)
    tile_recording.recording_of.cache_clear()
    assert tile_recording.recording_of(geometry, 0, 0) is None
    assert "not recorded" in caplog.text
    tile_recording.recording_of.cache_clear()


def test_a_large_list_is_not_recorded(geometry, monkeypatch):
    monkeypatch.setattr(tile_recording, "Recording", lambda tiler, device: "recorded")
    tile_recording.recording_of.cache_clear()
    long, longer = (replace(geometry, batch=1, rows=n, columns=n) for n in (2**14, 2**15))
    assert tile_recording.recording_of(long, 0, 0) == "recorded"
    assert tile_recording.recording_of(longer, 0, 0) is None
    tile_recording.recording_of.cache_clear()
