"""Pictures of masks as text: shades, sizes, captions."""

import pytest

from cudnn_flex_compile.report.picture import HEIGHT, SHADES, WIDTH, Picture, coarser, shade


@pytest.mark.parametrize(
    ("share", "character"),
    [(0.0, "·"), (1e-6, "░"), (0.33, "░"), (0.34, "▒"), (0.66, "▒"), (0.67, "▓"), (1 - 1e-6, "▓"), (1.0, "█")],
)
def test_shades(share, character):
    assert shade(share) == character
    assert character in SHADES


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (16, 32), (64, 128), (50, 33)])
def test_fits_its_frame(rows, columns):
    cells = tuple(tuple(float(i >= j) for j in range(columns)) for i in range(rows))
    lines = Picture(cells, (rows, columns)).lines()
    assert len(lines) == min(rows, HEIGHT)
    assert {len(line) for line in lines} == {min(columns, WIDTH)}


def test_means_over_disjoint_blocks():
    cells = ((1.0, 0.0, 1.0), (1.0, 0.5, 0.0), (0.0, 0.0, 0.0))
    assert coarser(cells, 3, 3) == cells
    assert coarser(cells, 1, 1) == ((3.5 / 9,),)
    assert coarser(cells, 2, 2) == ((1.0, 0.5), (0.5, 0.125))


def test_a_single_visible_pair_is_seen():
    cells = tuple(tuple(float((i, j) == (17, 93)) for j in range(128)) for i in range(64))
    assert "".join(Picture(cells, (64, 128)).lines()).count("░") == 1


def test_caption():
    assert Picture(((1.0,),), (4096, 128)).caption == "q 0-4095 down, kv 0-127 across"
    assert Picture(((1.0,),), (1, 1), "head 0").caption == "q 0-0 down, kv 0-0 across, head 0"
