"""Tables of what ways to run a call take on a device: how they are read, and what stands between measured points."""

import json
from types import SimpleNamespace

import pytest
import torch

from cudnn_flex_compile.calibrate.grid import DIMS, LENGTHS, WAYS
from cudnn_flex_compile.passes.decide import device_times
from cudnn_flex_compile.passes.decide.device_times import FOLDER, DeviceTimes, read, times_of
from tests.support import device_table
from tests.support.docs_tables import shown

CELLS = {
    ("native", "forward", "plain", 64): ((256, 1024), (2.0, 1.0)),
    ("native", "forward", "plain", 128): ((256, 1024), (4.0, 2.0)),
}


@pytest.mark.parametrize(
    ("dim", "length", "expected"),
    [(64, 256, 2.0), (64, 512, 2**0.5), (128, 1024, 2.0), (256, 16, 4.0), (32, 10**6, 1.0)],
)
def test_between_points_and_beyond_the_ends(dim, length, expected):
    assert DeviceTimes("x", CELLS).rate("native", "forward", "plain", dim, length) == pytest.approx(expected)


def test_between_head_dims():
    assert 2.0 < DeviceTimes("x", CELLS).rate("native", "forward", "plain", 96, 256) < 4.0


def test_what_was_not_measured():
    assert DeviceTimes("x", CELLS).rate("tile_lists", "forward", "plain", 64, 256) is None


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_the_tables_of_the_package_have_every_cell(path):
    table = read(path)
    for kind, ways in WAYS.items():
        for way in ways:
            for direction in ("forward", "backward"):
                for dim in DIMS:
                    lengths, rates = table.cells[way, direction, kind, dim]
                    assert set(LENGTHS) <= set(lengths)
                    assert all(0 < rate < 1000 for rate in rates)


def test_a_table_of_ones_own_goes_before_that_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(device_times, "settings", lambda: SimpleNamespace(folder=tmp_path))
    row = {"way": "native", "kind": "plain", "dim": 64, "length": 256, "forward": 1.0, "backward": 2.0}
    (tmp_path / "devices").mkdir()
    (tmp_path / "devices" / "NVIDIA_H200.json").write_text(json.dumps({"device": "mine", "rows": [row]}))
    device_times._table.cache_clear()
    try:
        assert times_of(torch.device("cpu")).device == "mine"
    finally:
        device_times._table.cache_clear()


def test_a_file_that_is_no_table(tmp_path):
    (tmp_path / "x.json").write_text('{"device": "x"}')
    with pytest.raises(ValueError, match=r"is no table of `cudnn-flex calibrate`.*delete it"):
        read(tmp_path / "x.json")


def test_the_page_shows_the_table():
    assert shown(device_table.PAGE, device_table.NAME) == device_table.table()
