"""Tables of rows are made by functions that Inductor compiles on a GPU: here, on the CPU, it takes all of them."""

import pytest
import torch

from cudnn_flex_compile.kernels import hot_function, row_tables
from cudnn_flex_compile.kernels.visible_pairs import Pairs, mask_of, text_of
from cudnn_flex_compile.scoremod.ir import TRUE
from tests.support.mask_runs import SOURCES, shown
from tests.support.mask_sources import CPU, brute_force, normal
from tests.unit.kernels.test_row_tables import BLOCK, blocks_of, given_of

CASES = [
    ("causal documents", "needed"), ("padding id", "none"),
    pytest.param("prefix", "any", marks=pytest.mark.any_torch),
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
    given, tensors, _ = given_of(source, 1, 40)
    own = brute_force(source, given, sizes)
    blocks, partial, full = blocks_of(kind, own, 1)
    program = text_of(normal(source, given).mask, TRUE)
    pairs = Pairs(program, tensors, (), [], [], sizes, blocks, BLOCK, CPU)
    heads = sizes[1] if pairs.axes[1] > 1 else 1
    assert mask_of(program).parts is not None
    few, by_runs = row_tables.by_few(pairs, heads), row_tables.by_runs(pairs, heads)
    assert compiled == [True, True]
    recorded = row_tables.recipe_by_runs(pairs, heads).compiled(*map(torch.zeros_like, pairs.tensors))
    assert all(map(torch.equal, recorded(*pairs.tensors), by_runs))
    for table, numbers in (few, by_runs):
        if numbers[0] <= 3 and numbers[1]:
            assert (shown(table, sizes).expand(sizes) == ((own & partial) | full)).all()
    row_tables._function.cache_clear()
