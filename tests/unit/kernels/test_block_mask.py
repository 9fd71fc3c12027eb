"""The BlockMask contract against brute force over every block and pair: agreeing masks pass, others are caught."""

import functools
import gc
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from cudnn_flex_compile.kernels import block_mask
from cudnn_flex_compile.kernels.block_mask import agree, check
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.partition import partition
from cudnn_flex_compile.scoremod.ranges import narrow
from cudnn_flex_compile.scoremod.simplify import normalize
from cudnn_flex_compile.scoremod.text import text
from cudnn_flex_compile.scoremod.trace import Captured, trace
from tests.unit.evaluate import CPU

LENGTHS = torch.tensor([70, 200], dtype=torch.int32)
DOCUMENTS = torch.arange(400) // 90
MASKS = {
    "causal": (lambda b, h, q, kv: q >= kv, ()),
    "window": (lambda b, h, q, kv: (q >= kv) & (q - kv <= 70), ()),
    "everything": (lambda b, h, q, kv: q >= 0, ()),
    "nothing": (lambda b, h, q, kv: q < 0, ()),
    "per head": (lambda b, h, q, kv: q + 64 * h >= kv, ()),
    "per batch": (lambda b, h, q, kv: (q >= kv) | (kv < 100 * b), ()),
    "lengths": (lambda b, h, q, kv, lengths: (q >= kv) & (kv < lengths[b]), (LENGTHS,)),
    "documents": (lambda b, h, q, kv, ids: (ids[q] == ids[kv]) & (q >= kv), (DOCUMENTS,)),
    "every other": (lambda b, h, q, kv: (q + kv) % 2 == 0, ()),
}
SIZES = [(2, 2, 256, 256), (2, 1, 200, 256), (1, 2, 130, 77), (2, 2, 128, 300), (1, 1, 1, 130), (1, 1, 64, 1)]
BLOCKS = [(128, 128), (64, 64), (128, 64), (64, 128)]


@functools.cache
def compiled(name: str, sizes: tuple[int, ...]):
    """The program of a mask, and its operands."""
    from cudnn_flex_compile.passes.hoist import operand_value

    function, tensors = MASKS[name]
    leaves = [ir.capture(i, {torch.int32: "i32", torch.int64: "i64"}[t.dtype]) for i, t in enumerate(tensors)]
    captured = [Captured(t, leaf) for t, leaf in zip(tensors, leaves, strict=True)]
    mask = narrow(trace(function, False, captured, CPU))
    program, hoisted = partition(normalize(ir.program(mask=mask)))
    return program, [operand_value(h, lambda leaf: tensors[leaf.value], sizes, CPU) for h in hoisted]


@functools.cache
def dense(name: str, sizes: tuple[int, ...]) -> torch.Tensor:
    """[B, H, Sq, Skv] by the user's own function."""
    function, tensors = MASKS[name]
    where = [torch.arange(n).view([-1 if i == d else 1 for i in range(4)]) for d, n in enumerate(sizes)]
    return function(*where, *tensors).expand(sizes)


def stock(name: str, sizes: tuple[int, ...], block: tuple[int, int], broadcast: bool = False) -> BlockMask:
    function, tensors = MASKS[name]
    batch, heads = (None, None) if broadcast else sizes[:2]
    return create_block_mask(
        lambda b, h, q, kv: function(b, h, q, kv, *tensors), batch, heads, *sizes[2:], "cpu", BLOCK_SIZE=block
    )


NAMES = (
    "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices",
    "full_q_num_blocks", "full_q_indices",
)  # fmt: skip


def tensors_of(mask: BlockMask) -> list[torch.Tensor]:
    """As passes/block_mask.py passes them on."""
    return [t for t in (getattr(mask, name) for name in NAMES) if t is not None]


def brute_force(mask: BlockMask, visible: torch.Tensor, block: tuple[int, int]) -> bool:
    """Block by block, in Python."""
    batch, heads, length, columns = visible.shape
    rows, cols = -(-length // block[0]), -(-columns // block[1])
    for b, h, i in itertools.product(range(batch), range(heads), range(rows)):
        kinds = {}
        for kind, count, index in (
            ("partial", "kv_num_blocks", "kv_indices"),
            ("full", "full_kv_num_blocks", "full_kv_indices"),
        ):
            if getattr(mask, count) is not None:
                near = [min(x, n - 1) for x, n in zip((b, h), getattr(mask, count).shape, strict=False)]
                listed = getattr(mask, index)[near[0], near[1], i, : int(getattr(mask, count)[near[0], near[1], i])]
                kinds.update(dict.fromkeys(listed.tolist(), kind))
        for j in range(cols):
            pairs = visible[b, h, i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            wrong = pairs.any() if j not in kinds else kinds[j] == "full" and not pairs.all()
            if wrong:
                return False
    return True


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("made_for", MASKS)
def test_every_mask_against_every_block_mask(made_for: str, sizes: tuple[int, ...], block: tuple[int, int]) -> None:
    mask = stock(made_for, sizes, block)
    for name in MASKS:
        program, operands = compiled(name, sizes)
        expected = brute_force(mask, dense(name, sizes), block)
        assert bool(agree(tensors_of(mask), operands, [], [], program, sizes, block)) == expected, name
        assert expected or name != made_for


@pytest.mark.parametrize("name", ["causal", "window", "documents", "every other", "per batch"])
def test_masks_that_broadcast(name: str) -> None:
    sizes, block = (2, 3, 200, 256), (64, 64)
    mask = stock(name, sizes, block, broadcast=True)
    program, operands = compiled(name, sizes)
    expected = brute_force(mask, dense(name, sizes), block)
    assert bool(agree(tensors_of(mask), operands, [], [], program, sizes, block)) == expected
    assert expected == (name != "per batch")


@pytest.mark.parametrize("rows", [64, 128])
def test_long_masks_go_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(block_mask, "CHUNK", rows * 256 * 4)
    for name, made_for in itertools.product(("per batch", "lengths", "causal"), repeat=2):
        sizes, block = (2, 2, 400, 256), (64, 64)
        program, operands = compiled(name, sizes)
        mask = stock(made_for, sizes, block)
        expected = brute_force(mask, dense(name, sizes), block)
        assert bool(agree(tensors_of(mask), operands, [], [], program, sizes, block)) == expected


def from_pattern(partial: np.ndarray, full: np.ndarray | None, block: int, sizes: tuple[int, ...]) -> BlockMask:
    """BlockMask.from_kv_blocks from [B, H, rows, columns] booleans."""

    def ordered(pattern: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        count = torch.tensor(pattern.sum(-1), dtype=torch.int32)
        return count, torch.tensor(np.argsort(~pattern, axis=-1, kind="stable"), dtype=torch.int32)

    more = (None, None) if full is None else ordered(full)
    return BlockMask.from_kv_blocks(*ordered(partial), *more, BLOCK_SIZE=block, seq_lengths=sizes[2:])


@settings(max_examples=300)
@given(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1), st.booleans(), st.sampled_from(list(MASKS)))
def test_any_pattern_of_blocks(partial_bits: int, full_bits: int, with_full: bool, name: str) -> None:
    sizes, block = (1, 1, 32, 32), 8
    bits = np.array([[partial_bits >> i & 1, full_bits >> i & 1] for i in range(16)], dtype=bool)
    if name == "causal":  # patterns near the right one: one or two bits off
        right = np.tril(np.ones((4, 4), dtype=bool)).ravel()
        flips = np.arange(16) == partial_bits % 32
        bits = np.stack([right ^ flips, np.eye(4, k=-1, dtype=bool).ravel() ^ (np.arange(16) == full_bits % 64)], -1)
    partial, full = (bits[:, i].reshape(1, 1, 4, 4) for i in (0, 1))
    mask = from_pattern(partial, full if with_full else None, block, sizes)
    program, operands = compiled(name, sizes)
    expected = brute_force(mask, dense(name, sizes), (block, block))
    assert bool(agree(tensors_of(mask), operands, [], [], program, sizes, (block, block))) == expected


CAUSAL = np.tril(np.ones((2, 2), dtype=bool))[None, None]
STRICT = np.tril(np.ones((2, 2), dtype=bool), -1)[None, None]


@pytest.mark.parametrize(
    ("partial", "full", "good"),
    [
        (CAUSAL, None, True), (CAUSAL & ~STRICT, STRICT, True), (CAUSAL, STRICT, True),
        (np.ones_like(CAUSAL), None, True),  # listed needlessly
        (CAUSAL & ~STRICT, None, False), (STRICT, None, False),  # omitted
        (STRICT, CAUSAL & ~STRICT, False), (np.zeros_like(CAUSAL), CAUSAL, False),  # "full" with masked pairs
        (CAUSAL, ~CAUSAL, False),
    ],
)  # fmt: skip
def test_from_kv_blocks(partial: np.ndarray, full: np.ndarray | None, good: bool) -> None:
    sizes = (1, 1, 256, 256)
    mask = from_pattern(partial, full, 128, sizes)
    program, _ = compiled("causal", sizes)
    assert bool(agree(tensors_of(mask), [], [], [], program, sizes, (128, 128))) == good


def test_without_blocks_of_queries() -> None:
    """compute_q_blocks=False, for inference."""
    sizes = (1, 1, 256, 256)
    program, _ = compiled("causal", sizes)
    for pattern in (CAUSAL, STRICT, ~CAUSAL):
        blocks = tensors_of(from_pattern(pattern, None, 128, sizes))[:2]
        assert bool(agree(blocks, [], [], [], program, sizes, (128, 128))) == bool((pattern == CAUSAL).all())


def test_blocks_of_queries_that_say_something_else() -> None:
    sizes = (1, 1, 256, 256)
    program, _ = compiled("causal", sizes)
    right, wrong = (tensors_of(from_pattern(p, None, 128, sizes)) for p in (CAUSAL, np.ones_like(CAUSAL)))
    assert not bool(agree([*right[:2], *wrong[2:]], [], [], [], program, sizes, (128, 128)))


@pytest.fixture(autouse=True)
def _forget() -> None:
    block_mask._agreed.clear()


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
    import contextlib

    return contextlib.nullcontext() if name == "per batch" else pytest.raises(RuntimeError, match="do not agree")


def test_a_verdict_is_remembered_for_the_same_tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = block_mask.agree
    monkeypatch.setattr(block_mask, "agree", lambda *a: calls.append(1) or real(*a))
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
    assert len(block_mask._agreed) == 1
    del mask
    gc.collect()
    assert len(block_mask._agreed) == 0


def test_numbers_and_lengths_of_the_step_count() -> None:
    mask = from_pattern(np.ones((1, 1, 2, 2), dtype=bool) & CAUSAL, None, 128, (1, 1, 256, 256))
    shifted = ir.program(mask=ir.intern("ge", "bool", (ir.index("q") + ir.scalar(0, "i32"), ir.index("k"))))
    check(tensors_of(mask), [], [0], [], text(shifted), (1, 1, 256, 256), (128, 128))
    with pytest.raises(RuntimeError, match="do not agree"):
        check(tensors_of(mask), [], [5], [], text(shifted), (1, 1, 256, 256), (128, 128))
