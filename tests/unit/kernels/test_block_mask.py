"""The BlockMask contract against brute force over every block and pair: agreeing masks pass, others are caught."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cudnn_flex_compile.kernels import block_mask
from cudnn_flex_compile.kernels.block_mask import agree
from cudnn_flex_compile.scoremod import interpret
from tests.support.blocks import (
    BLOCKS,
    CAUSAL,
    MASKS,
    SIZES,
    STRICT,
    brute_force,
    compiled,
    dense,
    from_pattern,
    stock,
    tensors_of,
)


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
    monkeypatch.setattr(interpret, "CHUNK", rows * 256 * 4)
    for name, made_for in itertools.product(("per batch", "lengths", "causal"), repeat=2):
        sizes, block = (2, 2, 400, 256), (64, 64)
        program, operands = compiled(name, sizes)
        mask = stock(made_for, sizes, block)
        expected = brute_force(mask, dense(name, sizes), block)
        assert bool(agree(tensors_of(mask), operands, [], [], program, sizes, block)) == expected


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


@pytest.mark.parametrize(
    ("partial", "full", "good"),
    [
        (CAUSAL, None, True), (CAUSAL & ~STRICT, STRICT, True),
        (np.ones_like(CAUSAL), None, True),  # listed needlessly
        (CAUSAL & ~STRICT, None, False), (STRICT, None, False),  # omitted
        (STRICT, CAUSAL & ~STRICT, False), (np.zeros_like(CAUSAL), CAUSAL, False),  # "full" with masked pairs
        (CAUSAL, ~CAUSAL, False),
        (CAUSAL, STRICT, False),  # in both lists: stock counts such pairs twice
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


@pytest.mark.parametrize("most", [block_mask.COMPARED, 0], ids=["compared", "scattered"])
@pytest.mark.parametrize("columns", [1, 5, 9])
def test_lists_by_brute_force(most: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way they are found; what is beyond a count, or beyond the columns, is not listed."""
    monkeypatch.setattr(block_mask, "COMPARED", most)
    generator = torch.Generator().manual_seed(columns)
    indices = torch.stack([torch.randperm(7, generator=generator) for _ in range(24)]).view(2, 3, 4, 7).int()
    count = torch.randint(0, 8, (2, 3, 4), generator=generator, dtype=torch.int32)
    found = block_mask.listed(count, indices, columns)
    assert found.shape == (2, 3, 4, columns)
    for place in np.ndindex(2, 3, 4):
        expected = {i for i in indices[place][: int(count[place])].tolist() if i < columns}
        assert set(found[place].nonzero().flatten().tolist()) == expected
