"""Tables of rows are made by functions that Inductor compiles on a GPU: here, on the CPU, it takes all of them."""

import pytest
import torch

from cudnn_flex_compile.kernels import hot_function, row_tables
from cudnn_flex_compile.kernels.visible_pairs import Pairs, mask_of, text_of
from cudnn_flex_compile.scoremod.ir import TRUE
from cudnn_flex_compile.scoremod.masks.intervals import NARROW
from tests.support.mask_runs import SOURCES, shown
from tests.support.mask_sources import CPU, brute_force, normal
from tests.unit.kernels.test_row_tables import BLOCK, blocks_of, given_of

CASES = [
    ("causal documents", "needed"), ("padding id", "none"),
    pytest.param("prefix", "any", marks=pytest.mark.any_torch),
    pytest.param("scalar", "any", marks=pytest.mark.any_torch),
    pytest.param("per head", "needed", marks=pytest.mark.any_torch),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_inductor_compiles_it(name, kind, monkeypatch):
    compiled, compile = [], hot_function.HotFunction._compile

    def seen(self, tensors):
        made = compile(self, tensors)
        compiled.append(made is not self._function)
        return made

    monkeypatch.setattr(hot_function, "_pays", lambda tensor: True)
    monkeypatch.setattr(hot_function, "EAGER", 0)
    monkeypatch.setattr(hot_function.HotFunction, "_compile", seen)
    row_tables._function.cache_clear()
    sizes, source = (2, 3, 24, 40), SOURCES[name]
    given, tensors, ints = given_of(source, 1, 40)
    own = brute_force(source, given, sizes)
    blocks, partial, full = blocks_of(kind, own, 1)
    program = text_of(normal(source, given).mask, TRUE)
    pairs = Pairs(program, tensors, (), ints, [], sizes, blocks, BLOCK, CPU)
    heads = sizes[1] if pairs.axes[1] > 1 else 1
    assert mask_of(program).parts is not None
    ways = [way for way in row_tables.ways(pairs) if way in row_tables.COMPILED]
    asked = [(way, width) for way in ways for width in (NARROW, 15)[: 1 if way == row_tables.RUNS else 2]]
    for way, width in asked:
        table, numbers = found = row_tables.made(way, pairs, heads, width)
        recorded = row_tables.recipe(way, pairs, heads, width).compiled(*map(torch.zeros_like, pairs.tensors))
        assert all(map(torch.equal, recorded(*pairs.tensors), found))
        if numbers[0] <= width and numbers[1]:
            assert (shown(table, sizes).expand(sizes) == ((own & partial) | full)).all()
    assert compiled == [True] * len(asked)
    assert ways == [row_tables.RUNS, *ways[1:-1], row_tables.PAIRS]
    row_tables._function.cache_clear()
