"""Any BlockMask beside any mask_mod, changed from step to step: stock's numbers, no error, one compilation."""

import pytest

from cudnn_flex_compile.reasons import Code
from tests.support.any_block_masks import MASKS, Case, check

FUNCTIONS, STEPS = 3, 8  # of each mask; what runs in all is these times the number of masks, twice


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("number", range(len(MASKS)), ids=list(MASKS))
def test_any_block_mask(number, training, trainable):
    for i in range(FUNCTIONS):
        seed = number + len(MASKS) * (i + FUNCTIONS * training)
        call = check(Case(seed, "cpu"), STEPS, training, inner_backend="aot_eager")
        assert call.reason is None or call.reason.code is Code.ILLEGAL_OP  # two masks of captured tensors in one
