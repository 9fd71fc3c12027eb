"""Lists of tiles without a GPU: the frontend's compiler judges the tensors that its stages get, and what torch does
between them is run with stages that count what they are told.

The compiler wants to know for which device it compiles, before it is imported.
"""

import collections
import contextlib
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
from cudnn_flex_compile.engine.tiles import tile_list, tiler
from cudnn_flex_compile.engine.tiles.tile_list import Room
from cudnn_flex_compile.kernels.row_tables import Recipe

SCRIPT = """
import torch
from torch._subclasses import FakeTensorMode
from cudnn_flex_compile.engine.tiles import tile_list, tiler

def compile_only(self, stage, compiler, config, tensors, numbers):
    getattr(self._builder, compiler)(config, *tensors)
    print("compiled", stage)

tiler.Tiler._run = compile_only
torch.Tensor.copy_ = lambda self, other: self  # wants a device
with FakeTensorMode():
    for geometry in (
        tile_list.Geometry(2, 16, 16, 4096, 4096, 128, 128, 1, True, torch.bfloat16),
        tile_list.Geometry(1, 8, 2, 333, 200, 64, 64, 8, False, torch.float16),
    ):
        made = tiler.Tiler(geometry)
        table = torch.empty(geometry.mask_heads, 3, geometry.batch * geometry.rows, dtype=torch.int32, device="cuda")
        listed, needed = made.within(table, made.every_tile)
        assert listed.numbers.shape == (made.size(made.every_tile),)
        assert needed.shape == (4 if geometry.training else 2,)
"""


pytestmark = pytest.mark.skipif(not (util.find_spec("cutlass") and util.find_spec("tvm_ffi")), reason="no CuTe DSL")


@pytest.mark.any_torch
def test_stages_compile():
    there = {**os.environ, "FLEX_ATTENTION_ARCH": "90", "CUTE_DSL_ARCH": "sm_90a"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=there, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [line.split(" ", 1)[1] for line in done.stdout.splitlines() if line.startswith("compiled ")]
    backward, forward = ["k classify", "k count", "k write"], ["classify", "write"]
    assert compiled == [*backward, *forward, *forward]


@pytest.fixture
def geometry():
    return tile_list.Geometry(2, 16, 4, 256, 200, 128, 128, 1, True, torch.bfloat16)


ROOM = Room(7, 5, 11, 3)


def test_parts_do_not_overlap(geometry):
    made = tiler.Tiler(geometry)
    within = [kind + name for kind in ("", "full_", "k_", "k_full_") for name in ("counts", "offsets")]
    within += ["bits", "k_bits"]
    for room in (Room(), ROOM, made.every_tile):
        for layout in made._layouts(room):
            parts = sorted((p for name, p in layout.parts.items() if name not in within), key=lambda part: part.start)
            assert all(one.end <= other.start for one, other in itertools.pairwise(parts))
    listed, scratch = made._layouts(ROOM)
    assert [listed.parts[name].shape[0] for name in ("masks", "full_indices", "k_masks", "k_full_order")] == list(ROOM)
    assert [scratch.parts[name].shape for name in ("places", "k_places")] == [(7, 4), (11, 4)]
    for prefix in ("", "k_"):
        bits, seen, full = (scratch.parts[prefix + name] for name in ("bits", "seen", "full"))
        assert (bits.start, bits.end) == (seen.start, full.end)
    assert tile_list.Geometry.of(geometry.numbers, geometry.dtype) == geometry


def test_memory_grows_with_tiles_and_not_with_pairs(geometry):
    """131072 tokens of documents, of which each row of tiles shows a few."""
    long = replace(geometry, batch=1, rows=2**17, columns=2**17)
    made = tiler.Tiler(long)
    assert made.size(Room(4096, 2**15, 4096, 2**15)) * 4 < 40 * 2**20
    assert made._layouts(Room())[1].size * 4 < 2 * 2**20
    assert made.size(made.every_tile) * 4 > 2**32


def test_a_list_knows_what_its_kernels_take(geometry):
    made = tiler.Tiler(geometry)
    layout = made._layouts(ROOM)[0]
    listed = tile_list.TileList(torch.arange(layout.size, dtype=torch.int32), layout)
    assert listed.forward is listed.forward
    counts, indices, *_, masks, _, work = listed.forward
    assert int(counts[0, 0]) == layout.parts["counts"].start
    assert (indices.shape, masks.shape[0], masks.dtype) == ((7,), 7, torch.uint32)
    assert work.shape[1] == 4
    assert [t is None for t in listed.backward] == [name is None for name in tile_list.BACKWARD_PARTS]
    assert listed.backward[1].shape == (11,)


@pytest.fixture
def counts(monkeypatch):
    """Stages that write random counts; a list of their names."""
    ran, generator = [], torch.Generator().manual_seed(0)

    def run(self, stage, compiler, config, tensors, numbers):
        ran.append(stage)
        for counts in {"classify": tensors[3:5], "k count": tensors[2:4]}.get(stage, ()):
            counts.copy_(torch.randint(0, 5, counts.shape, generator=generator))

    monkeypatch.setattr(tiler.Tiler, "_run", run)
    return ran


GEOMETRIES = {  # batch, heads, kv heads, rows, columns, dim, value dim, heads of the mask
    "MHA": (2, 16, 16, 4096, 4096, 128, 128, 1), "L2 holds 2 of 6": (1, 6, 6, 1000, 40000, 128, 128, 1),
    "packed": (2, 16, 4, 333, 200, 128, 128, 1), "not packed": (1, 6, 2, 600, 600, 128, 128, 1),
    "a mask for each head": (2, 8, 2, 700, 512, 64, 64, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", GEOMETRIES)
def test_offsets_add_up_and_work_is_ordered(name, counts):
    made = tiler.Tiler(tile_list.Geometry(*GEOMETRIES[name], True, torch.bfloat16))
    g, forward = made.geometry, made._forward
    table = torch.zeros(g.mask_heads, 3, g.batch * g.rows, dtype=torch.int32)
    draft = made.draft(table, made.every_tile)
    for _ in range(2):  # memory that was used before
        made.fill(draft)
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


def last(draft, kind):
    return int(draft.views[f"{kind}offsets"][-1])


def test_nothing_is_written_where_there_is_no_room(geometry, counts):
    """A side whose tiles are more than there is memory for has no bits when they are written; the other one has."""
    made = tiler.Tiler(geometry)
    table = torch.zeros(1, 3, geometry.batch * geometry.rows, dtype=torch.int32)
    left = []

    def run(self, stage, compiler, config, tensors, numbers, run=tiler.Tiler._run):
        run(self, stage, compiler, config, tensors, numbers)
        bits = tensors[1:3] if stage in ("classify", "k classify") else ()
        for words in bits:
            words.view(torch.int32).fill_(-1)
        if stage in ("write", "k write"):
            left.append((stage, [int(t.view(torch.int32).count_nonzero()) for t in tensors[1:3]]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiler.Tiler, "_run", run)
        every = [10 * n for n in made.every_tile]  # the counts are at random
        for short, written in ((None, (True, True)), (0, (True, False)), (1, (True, False)), (2, (False, True)),
                               (3, (False, True))):  # fmt: skip
            left.clear()
            room = Room(*(0 if i == short else n for i, n in enumerate(every)))
            made.fill(made.draft(table, room))
            assert [stage for stage, _ in left] == ["k write", "write"]
            assert tuple(all(n > 0 for n in words) for _, words in left) == written, short
            assert tuple(any(n > 0 for n in words) for _, words in left) == written, short


def test_an_exact_list_has_room_for_what_was_counted(geometry, counts):
    made = tiler.Tiler(geometry)
    table = torch.zeros(1, 3, geometry.batch * geometry.rows, dtype=torch.int32)
    counted, room = made.count(table)
    assert counts == ["k classify", "k count", "classify"]
    assert room == Room(*(last(counted, kind) for kind in ("", "full_", "k_", "k_full_")))
    listed = made.write(counted, room)
    assert counts[3:] == ["k write", "write"]
    assert listed.numbers.numel() == made.size(room)
    views = listed.layout.views(listed.numbers)
    for name in ("counts", "offsets", "k_full_counts", "work"):
        assert torch.equal(views[name], counted.views[name])


def test_reserve_is_room_for_more_and_not_for_much_more():
    needed = Room(100, 1000, 0, 7)
    room = needed.with_reserve()
    assert room.holds(needed)
    assert room.holds(Room(120, 1200, 64, 64))
    assert all(n % tile_list.STEP == 0 for n in room)
    assert not room.holds(Room(1000, 1000, 0, 7))
    assert not room.is_wide_for(needed)
    assert Room(10**5, 10**5).is_wide_for(Room(10, 10))


@pytest.mark.parametrize("inference", [False, True])
def test_a_recorded_list_is_a_launch_and_a_copy_of_each_tensor(geometry, counts, without_cuda, inference):
    """It copies the tensors that a table is made of, the list, and its numbers."""
    made, rows = tiler.Tiler(geometry), geometry.batch * geometry.rows
    layouts = ((torch.Size((1, 3, rows)), torch.int32), (torch.Size((3,)), torch.int32))
    with torch.inference_mode(inference):
        recording = tile_recording.Recording(made, ROOM, Recipe(), layouts, torch.device("cpu"))
    assert len(counts) == 2 * 5
    table, numbers = torch.full((1, 3, rows), 7, dtype=torch.int32), torch.tensor([3, 1, 1], dtype=torch.int32)
    with Counted() as counted:
        listed, counted_tiles = recording((table, numbers))
    assert counted.ops == {"copy_": 2, "clone": 2}
    assert counted_tiles.shape == (3 + 4,)
    assert recording._graph.replays == 1
    assert len(counts) == 2 * 5
    assert torch.equal(recording._draft.table, table)
    assert listed.numbers.data_ptr() != recording._draft.listed.numbers.data_ptr()


def test_few_ops_between_the_stages(geometry, monkeypatch):
    """They are recorded, but each is a node of the graph, which the device takes microseconds for."""
    monkeypatch.setattr(tiler.Tiler, "_run", lambda *args: None)
    made = tiler.Tiler(geometry)
    draft = made.draft(torch.zeros(1, 3, geometry.batch * geometry.rows, dtype=torch.int32), ROOM)
    with Counted() as counted:
        made.fill(draft)
    guards = {"le": 4, "bitwise_and": 2, "mul_": 2}
    assert counted.ops == {"zero_": 1, "cumsum": 2, "add": 1, "sort": 1, "copy_": 1, **guards}


def test_what_cuda_does_not_record_is_listed_without(geometry, monkeypatch, caplog):
    def refuse(made, room, recipe, layouts, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(tile_recording, "Recording", refuse)
    tile_recording.recording_of.cache_clear()
    assert tile_recording.recording_of(geometry, ROOM, Recipe(), (), 0, 0) is None
    assert "not recorded" in caplog.text
    tile_recording.recording_of.cache_clear()


def test_a_large_list_is_not_recorded(geometry, monkeypatch):
    monkeypatch.setattr(tile_recording, "Recording", lambda *arguments: "recorded")
    tile_recording.recording_of.cache_clear()
    for room, expected in ((Room(2**10, 2**10, 2**10, 2**10), "recorded"), (Room(2**18, 0, 2**18, 0), None)):
        assert tile_recording.recording_of(geometry, room, Recipe(), (), 0, 0) is expected
    tile_recording.recording_of.cache_clear()
