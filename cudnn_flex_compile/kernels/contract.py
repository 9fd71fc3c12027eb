"""Holds BlockMasks to their contract at every step: what was compared already, and when the host looks at the result.

Knows nothing of the comparison itself (block_mask.py).
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.kernels.block_mask import agree
from cudnn_flex_compile.kernels.later import Reading, later
from cudnn_flex_compile.scoremod.text import parse
from cudnn_flex_compile.torch_private import version_of

MISMATCH = (
    "cudnn_flex: the BlockMask's blocks do not agree with its mask_mod: a block that the mask_mod leaves visible is"
    " omitted, or a block listed as full has masked pairs. Build it with create_block_mask from the same mask_mod, or"
    " compile again (torch.compiler.reset()) with this BlockMask, whose calls are then kept on the inner backend."
)
# What each kv_indices tensor was last found to agree with; one that is freed takes its entries with it.
_agreed = WeakIdKeyDictionary()  # to dictionaries of what _identity gave, by question
_breaches = 0


def check(
    blocks: Sequence[Tensor], operands: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor],
    program: str, sizes: Sequence[int], block_sizes: Sequence[int],
) -> None:  # fmt: skip
    """Compares the blocks with a program, unless it is known that they agree.

    Args:
        blocks: kv_num_blocks and kv_indices alone; these and q_num_blocks, q_indices; or the pairs of kv_*,
            full_kv_*, q_* and full_q_*.
        operands, ints, floats, program: as the attention op takes them; only the mask is evaluated.
        sizes: of b, h, q, k. block_sizes: of q, k.

    Raises:
        RuntimeError: a mismatch, at the end of the compiled graph (later.py); under CUDA graph capture, an assertion
            of the device at every replay.
    """
    question = None if operands or floats else (program, *sizes, *block_sizes, *ints)
    hold(blocks, (), question, lambda: agree(blocks, operands, ints, floats, parse(program), sizes, block_sizes))


def hold(
    blocks: Sequence[Tensor], captured: Sequence[Tensor], question: Hashable, compare: Callable[[], Tensor]
) -> None:
    """The same for any comparison. What has been compared is taken to agree until the host looks; `breaches` says
    whether anything that was taken so did not.

    Args:
        blocks: the tensors of the BlockMask. captured: what else is compared, beside constants.
        question: what the answer holds for, beside these tensors; None if it can't be remembered.
        compare: gives a boolean, 0-d, on their device.
    """
    if blocks[0].is_cuda and torch.cuda.is_current_stream_capturing():
        torch_private.assert_on_device(compare())
        return
    tensors = (*blocks, *captured)
    known: dict[Hashable, Any] = _agreed.setdefault(blocks[1], {})  # pyright: ignore[reportAssignmentType]
    lasting = question is not None and not any(t.is_inference() for t in tensors)  # their versions are not counted
    if lasting and question in known and _unchanged(known[question], tensors):
        return
    reading = Reading(compare())
    if lasting:
        known[question] = _identity(tensors)

    def look() -> None:
        global _breaches
        if not reading():
            known.pop(question, None)
            _breaches += 1
            raise RuntimeError(MISMATCH)

    later(look, reading.there)


def breaches() -> int:
    """How many BlockMasks did not agree, so far."""
    return _breaches


Identity = list[tuple[TensorWeakRef, int]]  # a freed tensor's address may be another's: none is known by it


def _identity(tensors: Sequence[Tensor]) -> Identity:
    return [(TensorWeakRef(t), version_of(t)) for t in tensors]


def _unchanged(identity: Identity, tensors: Sequence[Tensor]) -> bool:
    return all(ref() is t and version == version_of(t) for (ref, version), t in zip(identity, tensors, strict=True))
