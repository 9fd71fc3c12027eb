"""Tables of endpoints against their definition, for rows at random: with few and with many runs."""

import pytest
import torch

from cudnn_flex_compile.scoremod.masks.intervals import (
    NARROW,
    as_table,
    every_endpoint,
    few_endpoints,
    most_endpoints,
    of_one_run,
)
from cudnn_flex_compile.scoremod.partition import pairwise
from tests.support.mask_runs import SOURCES, captured, shown
from tests.support.mask_sources import normal, used


def rows(seed, shape):
    """Rows with a few changes, at the ends, too."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) < (0.02, 0.1, 0.5)[seed % 3]).cumsum(-1) % 2 == seed % 2


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shape", [(1, 1, 7, 1), (2, 1, 9, 40), (1, 3, 1, 33), (2, 3, 24, 25)])
def test_tables_show_the_rows(seed, shape):
    visible, sizes, heads = rows(seed, shape), (2, 3, *shape[2:]), shape[1]
    most = int(most_endpoints(visible))
    halves = [visible[:, :, :3], visible[:, :, 3:]] if shape[2] > 3 else [visible]
    for width in (most, most + 1, sizes[3] + 1):
        table = every_endpoint(iter([(3 * i, half) for i, half in enumerate(halves)]), sizes, heads, width)
        assert (table.shape, table.dtype) == ((heads, width | 1, 2 * shape[2]), torch.int32)
        assert torch.equal(shown(table, sizes), visible.expand(2, heads, -1, -1))
        assert (table.diff(dim=1) >= 0).all()
    previous = [torch.nn.functional.pad(half[..., :-1], (1, 0)) for half in halves]
    found, count = few_endpoints(zip(halves, previous, strict=True), shape[3])
    assert int(count) == most
    if most <= NARROW:
        assert torch.equal(shown(as_table(found, sizes, heads), sizes), visible.expand(2, heads, -1, -1))


def test_too_narrow_a_table_is_no_error():
    visible = rows(2, (1, 1, 9, 40))
    table = every_endpoint(iter([(0, visible)]), (1, 1, 9, 40), 1, 2)
    assert table.shape == (1, 3, 9)


def test_rows_of_one_run():
    start, end = torch.tensor([0, 3, 5, 9]).view(1, 1, 4), torch.tensor([9, 4, 9, 9]).view(1, 1, 4)
    table = of_one_run(start, end, (2, 2, 4, 9), 2)
    assert table.shape == (2, NARROW, 8)
    kv = torch.arange(9)
    assert torch.equal(shown(table, (2, 2, 4, 9))[1, 1], (start[0, 0, :, None] <= kv) & (kv < end[0, 0, :, None]))


def test_pairwise_reads_operands_along_one_axis():
    given = used(SOURCES["offsets"], captured(1, 2, 8))
    _, hoisted = pairwise(normal(SOURCES["offsets"], given))
    assert [part.dims for part in hoisted] == ["bq"]
    given = {"bias": torch.ones(8, 8, dtype=torch.bool)}
    assert pairwise(normal("bias[q, kv] & (q >= kv)", given)) is None
