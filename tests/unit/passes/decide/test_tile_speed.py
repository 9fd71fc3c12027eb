"""Where a list of tiles is said to be faster than cuDNN's graphs, for each direction."""

import pytest
import torch

from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.passes.decide.tile_speed import faster_by_tiles
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.optable import make
from tests.unit.passes.decide.test_keep_rules import CAUSAL, DISTANCE, SHORT_ROWS, facts

BOTH = FORWARD, BACKWARD
FULL = ir.program()
SHARED = {"sharing": 12}
WINDOW = ir.program(mask=make("and", CAUSAL.mask, make("lt", DISTANCE, ir.const(256, ir.I32))))


def given(length, dim, heads=32, program=CAUSAL, **more):
    found = facts(length, length, heads=heads, program=program, **{**SHARED, **more})
    for tensor in (found.call.query, found.call.key, found.call.value):
        tensor.shape = (*tensor.shape[:3], dim)
    return found


TABLE = {
    "head dim 64": (given(4096, 64), BOTH),
    "head dim 128": (given(8192, 128), BOTH),
    "no mask at all": (given(8192, 128, program=FULL, blocks=False), BOTH),
    "head dim 256: the backward is slower": (given(8192, 256), (FORWARD,)),
    "head dim 256 without gradients": (given(8192, 256, training=False), (FORWARD,)),
    "head dim 72: of the next kind": (given(8192, 72), BOTH),
    "short sequences: the forward is slower": (given(512, 64, heads=768), (BACKWARD,)),
    "short sequences of another head dim": (given(512, 128, heads=768), ()),
    "shorter ones": (given(256, 64, heads=768), ()),
    "a window": (given(16384, 128, program=WINDOW, sharing=32), BOTH),
    "launches that would wait for the host": (given(1024, 64, heads=2), ()),
    "one call, which would save less than its list takes": (given(2048, 128, sharing=1, program=SHORT_ROWS), ()),
}


@pytest.mark.parametrize("name", TABLE)
def test_directions(name):
    inputs, expected = TABLE[name]
    assert faster_by_tiles(inputs, apart=True) == expected


def test_where_both_run_in_one_way_their_sum_decides():
    assert faster_by_tiles(given(8192, 128), apart=False) == BOTH
    assert faster_by_tiles(given(8192, 256), apart=False) == (), "the backward loses what the forward gains"
    assert faster_by_tiles(given(8192, 256, training=False), apart=False) == (FORWARD,)


def test_a_block_mask_that_hides_more_than_a_graph_skips():
    striped = ir.program(mask=make("eq", make("mod", DISTANCE, ir.const(3, ir.I32)), ir.const(0, ir.I32)))
    assert faster_by_tiles(given(8192, 256, program=striped, share=0.9), apart=True) == (FORWARD,)
    assert faster_by_tiles(given(8192, 256, program=striped, share=0.5), apart=True) == BOTH


def test_dtypes_are_alike():
    assert faster_by_tiles(given(8192, 128, dtype=torch.float16), apart=True) == BOTH
