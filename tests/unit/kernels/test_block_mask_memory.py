"""What is remembered of a comparison: an answer holds for the very tensors, versions and numbers that gave it."""

import gc

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from cudnn_flex_compile.kernels import block_mask_contract
from cudnn_flex_compile.kernels.block_mask_contract import ANSWER, agrees, answer_of, guard_of
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.text import text
from tests.support.blocks import CAUSAL, MASKS, from_pattern, over_captures, stock, tensors_of

SIZES, BLOCK = (1, 1, 256, 256), (128, 128)


@pytest.fixture(autouse=True)
def comparisons(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    block_mask_contract._known.clear()
    calls: list[int] = []
    real = block_mask_contract._agree
    monkeypatch.setattr(block_mask_contract, "_agree", lambda *a: calls.append(1) or real(*a))
    return calls


def answer(mask: BlockMask, name: str, captured=None, sizes=SIZES, block=BLOCK) -> bool:
    captured = MASKS[name][1] if captured is None else captured
    return answer_of(tensors_of(mask), captured, [], [], text(over_captures(name)), sizes, block)()


def test_answers() -> None:
    """causal's blocks also suit b = 0 of `per batch`; `every other` sees pairs above the diagonal."""
    mask = stock("causal", SIZES, BLOCK)
    found = [answer(mask, name) for name in ("causal", "causal", "everything", "per batch", "every other")]
    assert found == [True, True, False, True, False]


def test_an_answer_is_remembered_for_the_same_tensors_only(comparisons: list[int]) -> None:
    mask = stock("causal", SIZES, BLOCK)
    for _ in range(3):
        assert answer(mask, "causal")
    assert len(comparisons) == 1
    assert answer(stock("causal", SIZES, BLOCK), "causal")
    assert len(comparisons) == 2
    assert answer(mask, "per head")  # the same for one head, but another program
    assert len(comparisons) == 3


@pytest.mark.parametrize("what", ["blocks", "captured"])
def test_a_change_in_place_is_seen(what: str, comparisons: list[int]) -> None:
    lengths = MASKS["lengths"][1][0].clone()
    mask = stock("lengths", (2, 1, 256, 256), BLOCK)
    assert answer(mask, "lengths", [lengths], (2, 1, 256, 256))
    if what == "blocks":
        mask.kv_num_blocks.zero_()
    else:
        lengths.fill_(256)
    assert not answer(mask, "lengths", [lengths], (2, 1, 256, 256))
    assert not answer(mask, "lengths", [lengths], (2, 1, 256, 256))
    assert len(comparisons) == 2


def test_another_tensor_at_the_same_address_is_seen() -> None:
    """As when a freed count tensor's memory is given to the next one, beside indices that are kept."""
    mask = from_pattern(CAUSAL, None, 128, SIZES)
    memory = mask.kv_num_blocks.numpy().copy()
    program = text(over_captures("causal"))

    def run() -> bool:
        return answer_of([torch.from_numpy(memory), mask.kv_indices], [], [], [], program, SIZES, BLOCK)()

    assert run()
    gc.collect()
    memory[...] = 0
    assert not run()


def test_other_block_sizes_are_another_question() -> None:
    mask = from_pattern(CAUSAL, None, 128, SIZES)
    program, blocks = text(over_captures("causal")), tensors_of(mask)[:2]
    assert answer_of(blocks, [], [], [], program, SIZES, BLOCK)()
    assert not answer_of(blocks, [], [], [], program, SIZES, (128, 64))()


def test_freed_block_masks_are_forgotten() -> None:
    mask = stock("causal", SIZES, BLOCK)
    assert answer(mask, "causal")
    assert len(block_mask_contract._known) == 1
    del mask
    gc.collect()
    assert len(block_mask_contract._known) == 0


def test_inference_tensors_are_compared_each_time(comparisons: list[int]) -> None:
    with torch.inference_mode():
        mask = stock("causal", SIZES, BLOCK)
    assert answer(mask, "causal")
    mask.kv_num_blocks.numpy()[...] = 0
    assert not answer(mask, "causal")
    assert len(comparisons) == 2


def test_numbers_and_lengths_of_the_step_count() -> None:
    mask = from_pattern(np.ones((1, 1, 2, 2), dtype=bool) & CAUSAL, None, 128, SIZES)
    shifted = text(ir.program(mask=ir.intern("ge", "bool", (ir.index("q") + ir.scalar(0, "i32"), ir.index("k")))))
    assert answer_of(tensors_of(mask), [], [0], [], shifted, SIZES, BLOCK)()
    assert not answer_of(tensors_of(mask), [], [5], [], shifted, SIZES, BLOCK)()
    assert not answer_of(tensors_of(mask), [], [0], [], shifted, (1, 1, 256, 300), BLOCK)()


def test_a_guard_that_was_copied_is_found_out_anew(comparisons: list[int]) -> None:
    mask, program = stock("causal", SIZES, BLOCK), text(over_captures("causal"))
    blocks, query = tensors_of(mask), torch.empty(1, 1, 256, 8)
    guard = guard_of(blocks, [], [], [], program, SIZES, BLOCK)
    assert guard is guard_of(blocks, [], [], [], program, SIZES, BLOCK)
    for now in (guard, guard.clone()):
        assert agrees(([now, *blocks], [len(blocks), 0, *BLOCK], program), query, query, [], [])
    assert not hasattr(guard.clone(), ANSWER)
    assert len(comparisons) == 1
