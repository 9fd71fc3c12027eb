"""What a call shows, in the table of its rows' endpoints, against stock's definition at every pair: all masks, all
ways, with BlockMasks that agree and others.
"""

import itertools

import pytest
import torch

from cudnn_flex_compile.kernels import row_tables, visible_pairs
from cudnn_flex_compile.kernels.visible_pairs import Pairs, mask_of, text_of
from cudnn_flex_compile.scoremod.ir import TRUE
from cudnn_flex_compile.scoremod.masks import intervals
from cudnn_flex_compile.scoremod.masks.intervals import NARROW
from tests.support.mask_runs import EDGES, SOURCES, captured, shown
from tests.support.mask_sources import CPU, brute_force, normal, used

pytestmark = pytest.mark.any_torch
BLOCK = (8, 8)
KINDS = ("none", "needed", "needed and more", "any", "any, without full ones")


def patterns(kind, visible, seed):
    """Which blocks are partial, and which full, of a BlockMask that one is made of."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (-(-n // b) for n, b in zip(visible.shape[2:], BLOCK, strict=True))
    pad = columns * BLOCK[1] - visible.shape[3], rows * BLOCK[0] - visible.shape[2]
    tiled = [
        torch.nn.functional.pad(visible, (0, pad[0], 0, pad[1]), value=fill)
        .unflatten(3, (columns, -1)).unflatten(2, (rows, -1)) for fill in (False, True)
    ]  # fmt: skip
    some, every = tiled[0].any(-1).any(3), tiled[1].all(-1).all(3)
    drawn = torch.rand(some.shape, generator=generator)
    if kind.startswith("needed"):
        full = every & (drawn < 0.5)
        more = (drawn < 0.3) if kind.endswith("more") else torch.zeros_like(some)
        return (some | more) & ~full, full
    full = (drawn > 0.7) & ("without" not in kind)
    return (drawn < 0.5), full


def ordered(pattern):
    indices = torch.argsort((~pattern).to(torch.int8), dim=-1, stable=True)
    return pattern.sum(-1).to(torch.int32), indices.to(torch.int32)


def blocks_of(kind, visible, seed):
    """The tensors of a BlockMask, and which pairs are in partial and in full blocks."""
    if kind == "none":
        return [], torch.ones_like(visible), torch.zeros_like(visible)
    partial, full = patterns(kind, visible, seed)
    kinds = (partial,) if "without" in kind else (partial, full)
    tensors = [t for k in kinds for t in ordered(k)] + [t for k in kinds for t in ordered(k.transpose(2, 3))]
    q, kv = (torch.arange(n) // b for n, b in zip(visible.shape[2:], BLOCK, strict=True))
    return tensors, *(k[:, :, q][..., kv] for k in (partial, full))


def given_of(source, seed, length):
    """The mask's text, and what it captured, by position."""
    given = used(source, captured(seed, 2, length))
    tensors = [torch.zeros(1) if isinstance(v, int) else v for v in given.values()]
    return given, tensors, [v if isinstance(v, int) else 0 for v in given.values()]


@pytest.mark.parametrize("source", {**SOURCES, **EDGES}.values(), ids={**SOURCES, **EDGES}.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_shows_what_stock_shows(source, kind):
    for seed in range(8):
        sizes = (2, 3, (1, 8, 24, 33)[seed % 4], (24, 33, 1, 40)[seed // 2 % 4])
        given, tensors, ints = given_of(source, seed, max(sizes[2:]))
        own = brute_force(source, given, sizes)
        blocks, partial, full = blocks_of(kind, own, seed)
        expected = (own & partial) | full
        program = text_of(normal(source, given).mask, TRUE)
        pairs = Pairs(program, tensors, (), ints, [], sizes, blocks, BLOCK, CPU)
        heads = sizes[1] if pairs.axes[1] > 1 else 1
        changes = expected != torch.nn.functional.pad(expected[..., :-1], (1, 0), value=True)
        most, ways = int(changes.sum(-1).max()), row_tables.ways(pairs)
        assert (row_tables.RUNS in ways) == (mask_of(program).parts is not None)
        for way, width in itertools.product(ways, {most | 1, NARROW, row_tables.width_for(most)}):
            table, numbers = row_tables.made(way, pairs, heads, width)
            count, right, well = numbers.tolist()
            assert well
            if way in (row_tables.RUNS, row_tables.BLOCKS):
                assert right or not row_tables.known_beforehand(pairs) or (blocks and way == row_tables.RUNS)
                assert count == most or not right or way == row_tables.RUNS
            else:
                assert count == most or way == row_tables.FIRST_BLOCKS
                assert right or way == row_tables.FIRST_BLOCKS or (way == row_tables.PAIRS and width > NARROW)
            if right and count <= width:
                assert torch.equal(shown(table, sizes).expand(sizes), expected), (seed, way, width)


BY_RUNS = ("causal documents", "documents", "documents under a window", "one sequence of ids", "padding id", "prefix",
           "offsets", "prefix of each document", "everything", "nothing", "scalar", "per head")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("name", BY_RUNS)
def test_usual_masks_need_no_look_at_pairs(name, kind):
    """With contiguous documents (seed 1), and where a BlockMask is one of the mask's own."""
    sizes, source = (2, 3, 40, 40), SOURCES[name]
    given, tensors, ints = given_of(source, 1, 40)
    blocks, _, _ = blocks_of(kind, brute_force(source, given, sizes), 1)
    program = text_of(normal(source, given).mask, TRUE)
    pairs = Pairs(program, tensors, (), ints, [], sizes, blocks, BLOCK, CPU)
    assert row_tables.made(row_tables.RUNS, pairs, 3, NARROW).numbers.tolist() == [NARROW, 1, 1]


@pytest.mark.parametrize("side", ["left", "right", "none", "scattered"])
def test_padding_is_a_run_of_keys_or_not(side):
    padding = {
        "left": torch.arange(40) >= 11, "right": torch.arange(40) < 11, "none": torch.zeros(40, dtype=torch.bool),
        "scattered": torch.arange(40) % 3 > 0,
    }[side].expand(2, -1)  # fmt: skip
    program = text_of(normal("padding[b, kv] & (q >= kv)", {"padding": padding}).mask, TRUE)
    pairs = Pairs(program, [padding], (), [], [], (2, 3, 40, 40), [], (), CPU)
    table, numbers = row_tables.made(row_tables.RUNS, pairs, 1, NARROW)
    assert numbers.tolist() == [NARROW, side != "scattered", 1]
    expected = padding[:, None, None] & torch.ones(40, 40, dtype=torch.bool).tril()
    assert side == "scattered" or torch.equal(shown(table, (2, 3, 40, 40)), expected)


@pytest.mark.parametrize("hides", ["kv % 5 != 3", "kv < q + 3", "kv != 4"])
def test_what_the_score_hides_is_hidden_in_full_blocks_too(hides):
    own, always = (normal(source).mask for source in ("q >= kv", hides))
    causal = torch.ones(24, 24, dtype=torch.bool).tril().expand(1, 1, -1, -1)
    blocks, partial, full = blocks_of("any", causal, 0)
    pairs = Pairs(text_of(own, always), [], (), [], [], (1, 1, 24, 24), blocks, BLOCK, CPU)
    expected = ((causal & partial) | full) & brute_force(hides, {}, (1, 1, 24, 24))
    for way in row_tables.ways(pairs):
        table, numbers = row_tables.made(way, pairs, 1, 31)
        assert numbers[1] or way < row_tables.EVERY
        assert not numbers[1] or torch.equal(shown(table, (1, 1, 24, 24)), expected)


ILL_FORMED = {
    "twice in a row": lambda t: t[1][..., :2].zero_(),
    "in both lists": lambda t: (t[2].fill_(1), t[3].zero_()),
    "other ones for columns": lambda t: t[4].zero_(),
    "out of range": lambda t: t[1][..., 0].fill_(99),
}


@pytest.mark.parametrize("name", ILL_FORMED)
def test_no_list_is_made_of_what_stock_counts_twice(name):
    sizes = (1, 1, 24, 24)
    blocks, _, _ = blocks_of("needed", torch.ones(24, 24, dtype=torch.bool).tril().expand(1, 1, -1, -1), 0)
    blocks[0].fill_(2)
    ILL_FORMED[name](blocks)
    pairs = Pairs(text_of(normal("q >= kv").mask, TRUE), [], (), [], [], sizes, blocks, BLOCK, CPU)
    assert not row_tables.well_formed(pairs)
    for way in row_tables.ways(pairs):
        assert row_tables.made(way, pairs, 1, NARROW).numbers[2] == 0


@pytest.mark.parametrize("chunk", [40, 200, 1000])
@pytest.mark.parametrize("source", ["image blocks", "causal documents"])
def test_long_calls_go_some_rows_at_a_time(chunk, source, monkeypatch):
    monkeypatch.setattr(visible_pairs, "CHUNK", chunk)
    monkeypatch.setattr(row_tables, "CHUNK", chunk)
    monkeypatch.setattr(intervals, "SEGMENT", NARROW)  # which have no more endpoints
    sizes = (2, 1, 24, 40)
    given, tensors, ints = given_of(SOURCES[source], 1, 40)
    own = brute_force(SOURCES[source], given, sizes)
    for kind in ("none", "any"):
        blocks, partial, full = blocks_of(kind, own, 0)
        program = text_of(normal(SOURCES[source], given).mask, TRUE)
        pairs = Pairs(program, tensors, (), ints, [], sizes, blocks, BLOCK, CPU)
        right_ways = []
        for way in row_tables.ways(pairs):
            table, numbers = row_tables.made(way, pairs, 1, 63)
            if numbers[1]:
                right_ways.append(way)
                assert torch.equal(shown(table, sizes), (own & partial) | full)
        assert {row_tables.PAIRS, row_tables.EVERY} <= {*right_ways}


@pytest.mark.parametrize("source", ["image blocks", "causal documents", "per head", "everything"])
@pytest.mark.parametrize("repeat", ["heads", "batch", "both", "neither"])
def test_blocks_that_repeat_are_looked_at_once(source, repeat, monkeypatch):
    monkeypatch.setattr(intervals, "SEGMENT", NARROW)  # which have no more endpoints
    sizes = (2, 3, 24, 40)
    given, tensors, _ = given_of(SOURCES[source], 1, 40)
    own = brute_force(SOURCES[source], given, sizes).expand(sizes)
    kept = slice(1 if repeat in ("batch", "both") else None), slice(1 if repeat in ("heads", "both") else None)
    blocks, partial, full = blocks_of("any", own[kept], 0)
    blocks = [t.expand(2, 3, *t.shape[2:]) for t in blocks]
    program = text_of(normal(SOURCES[source], given).mask, TRUE)
    pairs = Pairs(program, tensors, (), [], [], sizes, blocks, BLOCK, CPU)
    named = {"causal documents": {"batch"}, "per head": {"batch", "heads"}}.get(source, set())
    cut = {"batch", "heads"} - named
    assert (row_tables.FIRST_BLOCKS in row_tables.ways(pairs)) == bool(cut)
    if not cut:
        return
    table, numbers = row_tables.made(row_tables.FIRST_BLOCKS, pairs, 3, 63)
    repeated = {"heads": {"heads"}, "batch": {"batch"}, "both": {"batch", "heads"}, "neither": set()}[repeat]
    assert bool(numbers[1]) == (cut <= repeated)
    if numbers[1]:
        assert torch.equal(shown(table, sizes), (own & partial) | full)


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_segments_of_a_row_have_few_endpoints_or_are_not_right(source, monkeypatch):
    monkeypatch.setattr(intervals, "SEGMENT", 8)
    found = set()
    for seed in range(12):
        sizes = (2, 3, 24, (33, 40)[seed % 2])
        given, tensors, ints = given_of(source, seed, 40)
        own = brute_force(source, given, sizes).expand(sizes)
        pairs = Pairs(text_of(normal(source, given).mask, TRUE), tensors, (), ints, [], sizes, [], (), CPU)
        heads = sizes[1] if pairs.axes[1] > 1 else 1
        table, numbers = row_tables.made(row_tables.PAIRS, pairs, heads, 63)
        changes = own != torch.nn.functional.pad(own[..., :-1], (1, 0), value=True)
        segments = torch.nn.functional.pad(changes, (0, -sizes[3] % 8)).unflatten(-1, (-1, 8)).sum(-1)
        assert numbers.tolist() == [int(changes.sum(-1).max()), int(segments.max() <= NARROW), 1]
        found.add(bool(numbers[1]))
        if numbers[1]:
            assert torch.equal(shown(table, sizes).expand(sizes), own)
    assert True in found or source == SOURCES["padding"]
