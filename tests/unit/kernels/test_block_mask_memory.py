"""What `check` remembers: a verdict holds for the very tensors, versions and numbers that it was found with."""

import contextlib
import gc

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from cudnn_flex_compile.kernels import contract
from cudnn_flex_compile.kernels.contract import check
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.text import text

from .blocks import CAUSAL, compiled, from_pattern, stock, tensors_of


@pytest.fixture(autouse=True)
def _forget() -> None:
    contract._agreed.clear()


def checked(mask: BlockMask, name: str, sizes=(1, 1, 256, 256), block=(128, 128)) -> None:
    program, operands = compiled(name, sizes)
    check(tensors_of(mask), operands, [], [], text(program), sizes, block)


def test_check_raises_where_they_disagree() -> None:
    mask = stock("causal", (1, 1, 256, 256), (128, 128))
    checked(mask, "causal")
    checked(mask, "causal")
    for other in ("everything", "per batch", "every other"):
        with (
            pytest.raises(RuntimeError, match="do not agree with its mask_mod")
            if other == "everything"
            else _nothing(other)
        ):
            checked(mask, other)


def _nothing(name: str):
    """causal's blocks also suit b = 0 of `per batch`; `every other` sees pairs above the diagonal."""
    return contextlib.nullcontext() if name == "per batch" else pytest.raises(RuntimeError, match="do not agree")


def test_a_verdict_is_remembered_for_the_same_tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = contract.agree
    monkeypatch.setattr(contract, "agree", lambda *a: calls.append(1) or real(*a))
    mask = stock("causal", (1, 1, 256, 256), (128, 128))
    for _ in range(3):
        checked(mask, "causal")
    assert len(calls) == 1
    checked(stock("causal", (1, 1, 256, 256), (128, 128)), "causal")
    assert len(calls) == 2
    checked(mask, "per head")  # the same for one head, but another program
    assert len(calls) == 3


def test_a_change_in_place_is_seen() -> None:
    mask = stock("causal", (1, 1, 256, 256), (128, 128))
    checked(mask, "causal")
    mask.kv_num_blocks.zero_()
    with pytest.raises(RuntimeError, match="do not agree"):
        checked(mask, "causal")


def test_another_tensor_at_the_same_address_is_seen() -> None:
    """As when a freed count tensor's memory is given to the next one, beside indices that are kept."""
    mask = from_pattern(CAUSAL, None, 128, (1, 1, 256, 256))
    memory = mask.kv_num_blocks.numpy().copy()
    program, _ = compiled("causal", (1, 1, 256, 256))

    def run() -> None:
        blocks = [torch.from_numpy(memory), mask.kv_indices]
        check(blocks, [], [], [], text(program), (1, 1, 256, 256), (128, 128))

    run()
    gc.collect()
    memory[...] = 0
    with pytest.raises(RuntimeError, match="do not agree"):
        run()


def test_other_block_sizes_are_another_question() -> None:
    mask = from_pattern(CAUSAL, None, 128, (1, 1, 256, 256))
    program, _ = compiled("causal", (1, 1, 256, 256))
    check(tensors_of(mask)[:2], [], [], [], text(program), (1, 1, 256, 256), (128, 128))
    with pytest.raises(RuntimeError, match="do not agree"):
        check(tensors_of(mask)[:2], [], [], [], text(program), (1, 1, 256, 256), (128, 64))


def test_freed_block_masks_are_forgotten() -> None:
    mask = stock("causal", (1, 1, 256, 256), (128, 128))
    checked(mask, "causal")
    assert len(contract._agreed) == 1
    del mask
    gc.collect()
    assert len(contract._agreed) == 0


def test_numbers_and_lengths_of_the_step_count() -> None:
    mask = from_pattern(np.ones((1, 1, 2, 2), dtype=bool) & CAUSAL, None, 128, (1, 1, 256, 256))
    shifted = ir.program(mask=ir.intern("ge", "bool", (ir.index("q") + ir.scalar(0, "i32"), ir.index("k"))))
    check(tensors_of(mask), [], [0], [], text(shifted), (1, 1, 256, 256), (128, 128))
    with pytest.raises(RuntimeError, match="do not agree"):
        check(tensors_of(mask), [], [5], [], text(shifted), (1, 1, 256, 256), (128, 128))
