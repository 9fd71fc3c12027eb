"""How lists are made step by step, with a tiler that hands the table on: what is found at each step is the list of that
step's mask, whatever the last one needed.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cudnn_flex_compile.engine.tiles.layout import Layout
from cudnn_flex_compile.engine.tiles.tile_list import Geometry, Room, TileList
from cudnn_flex_compile.kernels import list_making, row_tables
from cudnn_flex_compile.kernels.list_making import Listed, Needs
from cudnn_flex_compile.kernels.visible_pairs import Pairs, text_of
from cudnn_flex_compile.reasons import Code
from cudnn_flex_compile.scoremod.ir import TRUE
from tests.support.mask_runs import SOURCES, shown
from tests.support.mask_sources import CPU, brute_force, normal, used
from tests.unit.kernels.test_row_tables import BLOCK, blocks_of

SIZES = (2, 1, 64, 64)
GEOMETRY = Geometry.of([2, 1, 64, 64, 1, 64, 64, 1, 0], torch.bfloat16)


class Tiler:
    """Its lists are tables; a tile is a change of a row."""

    def __init__(self):
        self.made, self.recorded = [], 0

    def needed(self, table):
        count = int((table < SIZES[3]).sum())
        return Room(count, count // 2)

    def count(self, table):
        self.made.append("exact")
        return table, self.needed(table)

    def write(self, table, room):
        assert room.holds(self.needed(table))
        return TileList(table.clone(), Layout())

    def within(self, table, room):
        self.made.append("within")
        needed = self.needed(table)
        return TileList(table.clone() if room.holds(needed) else table.new_zeros(0), Layout()), torch.tensor(needed[:2])

    def size(self, room):
        return sum(room)

    @property
    def every_tile(self):
        return Room(10**6, 10**6)  # more than any table has


@pytest.fixture
def tiler(monkeypatch):
    made = Tiler()

    def recording_of(geometry, room, recipe, layouts, device, stream):
        made.recorded += 1

        def recording(tensors):
            assert tuple((t.shape, t.dtype) for t in tensors) == layouts
            table, numbers = recipe(*tensors)
            tiles, needed = made.within(table, room)
            return tiles, torch.cat((numbers, needed))

        return recording

    monkeypatch.setattr(list_making, "tiler_of", lambda geometry, device: made)
    monkeypatch.setattr(list_making, "recording_of", recording_of)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    return made


def documents(seed, count, shuffled=False):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, count, (2, 64), generator=generator).sort(-1).values
    return ids[:, torch.randperm(64, generator=generator)] if shuffled else ids


def pairs_of(source, ids):
    given = used(source, {"ids": ids, "row": ids[0], "prefix": torch.tensor([3, 9])})
    return Pairs(text_of(normal(source, given).mask, TRUE), list(given.values()), (), [], [], SIZES, [], (), CPU), given


def step(needs, source, ids, kind="none", seed=0):
    """One list, as its first call finds it; with tensors of its own, for those of the op may have changed by then."""
    pairs, given = pairs_of(source, ids.clone())
    own = brute_force(source, given, SIZES)
    blocks, partial, full = blocks_of(kind, own, seed)
    pairs, again = (replace(pairs, blocks=[t.clone() for t in blocks], block_sizes=BLOCK) for _ in range(2))
    listed = Listed(GEOMETRY, needs, 1)
    list_making.begin(listed, pairs)
    if listed.found is None:
        again = replace(again, captured=[t.clone() for t in pairs.captured])
        for tensor in (*pairs.captured, *pairs.blocks):
            tensor.zero_()
        listed.settle(lambda: again)
    assert torch.equal(shown(listed.found.numbers, SIZES), (own & partial) | full), ids
    return listed


@pytest.mark.parametrize("source", ["causal documents", "prefix of each document", "image blocks", "documents"])
def test_each_step_finds_its_own_list(source, tiler):
    needs = Needs()
    layouts = [(1, False)] * 2 + [(9, False)] * 4 + [(30, False), (30, True), (30, True), (3, True), (2, False)]
    for seed, (count, shuffled) in enumerate(layouts * 3):
        step(needs, SOURCES[source], documents(seed, count, shuffled))


@pytest.mark.parametrize("source", ["causal documents", "image blocks", "everything"])
def test_each_step_has_the_blocks_of_its_block_mask(source, tiler):
    needs, ways = Needs(), set()
    for seed in range(24):
        kind = ("needed", "any", "any, without full ones")[seed // 4 % 3]
        step(needs, SOURCES[source], documents(seed, 1 + seed % 9, seed in (9, 10, 21)), kind, seed)
        ways.add(needs.way)
    ahead = {row_tables.RUNS, row_tables.BLOCKS}
    assert ways == ({row_tables.PAIRS, row_tables.EVERY} if source == "image blocks" else ways | ahead)


def test_a_step_like_the_last_one_waits_for_nothing_until_its_call(tiler):
    needs = Needs()
    for seed in range(6):
        step(needs, SOURCES["causal documents"], documents(seed, 5))
    assert tiler.made == ["exact"] + ["within"] * 5
    assert tiler.recorded == 6 - 1 - list_making.RECORDED


def test_a_list_is_recorded_where_its_integers_stay(tiler):
    """A mask with a window that changes at each step is never recorded, and right."""
    source, given = "(ids[b, q] == ids[b, kv]) & (q - kv <= n) & (q >= kv)", {"ids": documents(0, 5)}
    for widths, recorded in ([*range(6)], 0), ([7] * 6, 6 - list_making.RECORDED), ([7, 8] * 3, 0):
        tiler.recorded, needs = 0, Needs()
        for n in (3, *widths):
            program = text_of(normal(source, {**given, "n": n}).mask, TRUE)
            pairs = Pairs(program, [given["ids"]], (), [0, n], [], SIZES, [], (), CPU)
            listed = Listed(GEOMETRY, needs, 1)
            list_making.begin(listed, pairs)
            if listed.found is None:
                listed.settle(lambda pairs=pairs: pairs)
            expected = brute_force(source, {**given, "n": n}, SIZES)
            assert torch.equal(shown(listed.found.numbers, SIZES), expected)
        assert tiler.recorded == recorded


def test_a_list_that_is_too_small_is_made_anew(tiler, monkeypatch):
    needs = Needs()
    for _ in range(2):
        step(needs, SOURCES["documents"], documents(0, 1))
    room = needs.room
    monkeypatch.setattr(needs, "room", Room(64, 0))
    tiler.made.clear()
    step(needs, SOURCES["documents"], documents(0, 64))
    assert tiler.made == ["within", "exact"]
    assert needs.room.holds(Room(65, 1))
    assert room.holds(Room(64, 0))


def test_runs_of_rows_are_tried_again(tiler, monkeypatch):
    tried, recipe = [], row_tables.recipe

    def seen(way, *args):
        tried.extend([1] * (way == row_tables.RUNS))
        return recipe(way, *args)

    monkeypatch.setattr(row_tables, "recipe", seen)
    needs, source = Needs(), SOURCES["causal documents"]
    step(needs, source, documents(0, 5, True))
    tried.clear()
    for seed in range(list_making.RETRY - 1):
        step(needs, source, documents(seed, 5))
    assert not tried
    for seed in range(4):
        step(needs, source, documents(seed, 5))
    assert len(tried) == 4


@pytest.mark.parametrize("kind", ["none", "needed", "any", "any, without full ones"])
@pytest.mark.parametrize("source", ["causal documents", "image blocks", "everything", "prefix"])
def test_what_is_captured_has_room_for_any_mask(source, kind, tiler):
    pairs, given = pairs_of(SOURCES[source], documents(0, 9, shuffled=True))
    own = brute_force(SOURCES[source], given, SIZES)
    blocks, partial, full = blocks_of(kind, own, 1)
    found = list_making.under_capture(replace(pairs, blocks=blocks, block_sizes=BLOCK), GEOMETRY)
    assert torch.equal(shown(found.numbers, SIZES), (own & partial) | full)


def test_reasons_instead_of_lists(tiler, monkeypatch):
    monkeypatch.setattr(list_making, "MIB", 1)
    pairs, _ = pairs_of(SOURCES["documents"], documents(0, 9))
    for budget in (10**9, 1):
        listed = Listed(GEOMETRY, Needs(), budget)
        list_making.begin(listed, pairs)
        assert isinstance(listed.found, TileList) == (budget > 1)
    assert listed.found.code is Code.LIST_BUDGET
    blocks = [torch.tensor([[[2]]]), torch.tensor([[[[0, 0]]]])]
    twice = Pairs(text_of(normal("q >= kv").mask, TRUE), [], (), [], [], SIZES, blocks, (64, 64), CPU)
    listed = Listed(GEOMETRY, Needs(), None)
    list_making.begin(listed, twice)
    assert listed.found is list_making.ILL_FORMED


@pytest.mark.parametrize("later", [False, True], ids=["at first", "as its call looks"])
@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("no kernel"), Code.INTERNAL), (torch.OutOfMemoryError("full"), Code.MEMORY)]
)
def test_a_list_that_cannot_be_made_is_a_reason(tiler, monkeypatch, error, code, later):
    def fails(*_):
        raise error

    pairs, _ = pairs_of(SOURCES["documents"], documents(0, 9))
    listed = Listed(GEOMETRY, Needs(), 1)
    monkeypatch.setattr(list_making, "_exact", fails)
    kept = []
    listed.keep = lambda: kept.append(1)
    if later:
        listed.settle(lambda: pairs)
    else:
        list_making.begin(listed, pairs)
    assert listed.found.code is code
    assert listed.passing == (code is Code.MEMORY)
    assert kept == ([1] if later and code is Code.INTERNAL else []), "a lack of memory is not remembered"


def test_what_is_most_of_a_mask(tiler):
    for source, most in (("q >= kv", 3), ("(q >= kv) & ((q - kv < 5) | (kv < 4))", 3), ("(q - kv) % 4 < 2", 33)):
        pairs = Pairs(text_of(normal(source).mask, TRUE), [], (), [], [], SIZES, [], (), CPU)
        assert list_making.most_endpoints(pairs).endpoints in (most, most - 1), source
