"""Remembers for each BlockMask whether its blocks agree with its mask_mod. If they do, plans may run its calls.

block_mask.py compares; stock.py runs calls whose blocks and mask_mod disagree. A BlockMask is compared once while it
stays the same, for all layers and graphs, and the host waits for the answer when the first call with it is about to be
launched. The answer is on the guard, a tensor that the comparison gives the calls.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.kernels.arguments import ANSWER
from cudnn_flex_compile.kernels.async_read import AsyncRead
from cudnn_flex_compile.kernels.block_mask import agree
from cudnn_flex_compile.kernels.hot_function import HotFunction
from cudnn_flex_compile.kernels.remembered import Remembered
from cudnn_flex_compile.kernels.stock import Given, Stock
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.hoisting import computed
from cudnn_flex_compile.scoremod.ir import F32, I32, Expr
from cudnn_flex_compile.scoremod.partition import partition
from cudnn_flex_compile.scoremod.simplify import normalize
from cudnn_flex_compile.scoremod.text import parse, text

KEPT = 64  # masks whose comparisons are kept


class Answer:
    """Whether blocks and mask agree. The host waits for it when it first asks."""

    __slots__ = ("_read", "known")

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read
        self.known: bool | None = None

    def __call__(self) -> bool:
        if self.known is None:
            self.known = bool(self._read())
        return self.known


AGREED = Answer(lambda: True)


class Compared(NamedTuple):
    """A BlockMask that was compared."""

    guard: Tensor
    answer: Answer


_known = Remembered[Compared](4 * KEPT)


def agrees(given: Given, query: Tensor, key: Tensor, ints: Sequence[int], floats: Sequence[Tensor]) -> bool:
    """Whether plans are right for a call; False if the device has to decide by the guard."""
    guard = given[0][0]
    answer = getattr(guard, ANSWER, None)
    if answer is not None:
        return answer()
    if guard.dtype is torch.bool:
        return not guard.is_cuda and bool(guard)
    stock = Stock.of(*given)  # a guard that was copied, as by hooks of saved tensors, has lost its answer
    sizes = (*query.shape[:3], key.shape[2])
    return answer_of(stock.blocks, stock.captured, ints, floats, only_mask(stock.program), sizes, stock.block_sizes)()


def guard_of(*mask: Any) -> Tensor:
    """An empty tensor with the answer. Arguments as those of `answer_of`."""
    return _compared(*mask).guard


def answer_of(*mask: Any) -> Answer:
    """Whether the blocks agree with a program.

    Args:
        blocks, captured, ints, floats, program, block_sizes: as in stock.Stock; only the mask of the program counts.
        sizes: the sizes of the axes b, h, q and k.
    """
    return _compared(*mask).answer


def with_answer(guard: Tensor, answer: Answer) -> Tensor:
    setattr(guard, ANSWER, answer)
    return guard


def _compared(
    blocks: Sequence[Tensor], captured: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor],
    program: str, sizes: Sequence[int], block_sizes: Sequence[int],
) -> Compared:  # fmt: skip
    mask = _mask(program)
    captured = captured[: mask.captured]
    tensors = (*blocks, *captured)
    numbers = (*(ints if mask.reads_ints else ()), *(map(float, floats) if mask.reads_floats else ()))
    question = (program, *sizes, *block_sizes, len(blocks), numbers)
    found = _known.get(question, tensors)
    capturing = blocks[0].is_cuda and torch.cuda.is_current_stream_capturing()
    if found is not None and not (capturing and found.answer.known is not False):
        return found

    def compare() -> Tensor:
        if numbers:
            return _agree(tensors, len(blocks), ints, floats, program, sizes, block_sizes)
        return _comparison(program, len(blocks), tuple(sizes), tuple(block_sizes))(*tensors)

    if capturing:  # the host can't read: each replay compares the BlockMask that is there then
        torch_private.assert_on_device(compare())
        return _with_guard(blocks[0], AGREED)
    compared = _with_guard(blocks[0], Answer(AsyncRead(compare())))
    _known.put(question, tensors, compared)
    return compared


def _with_guard(like: Tensor, answer: Answer) -> Compared:
    with torch.inference_mode(False):  # an inference tensor could not be saved for a backward
        return Compared(with_answer(torch.empty(0, dtype=torch.int32, device=like.device), answer), answer)


@dataclass(frozen=True, slots=True)
class Mask:
    """The mask of a program: over operands, with the expressions of these, and the scalars that it reads."""

    program: ir.Program
    hoisted: Sequence[Any]
    captured: int
    reads_ints: bool
    reads_floats: bool


@functools.lru_cache(KEPT)
def _mask(program: str) -> Mask:
    mask = parse(program).mask
    leaves = list(ir.walk(mask))
    alone, hoisted = partition(normalize(ir.program(mask=mask)))
    kinds = {n.dtype for n in leaves if n.kind == "scalar"}
    captured = max((int(n.value or 0) + 1 for n in leaves if n.kind == "capture"), default=0)
    return Mask(alone, hoisted, captured, I32 in kinds, F32 in kinds)


@functools.lru_cache(KEPT)
def only_mask(program: str) -> str:
    """The text of the program with the unmodified score."""
    return text(ir.program(mask=parse(program).mask))


@functools.lru_cache(KEPT)
def _comparison(program: str, blocks: int, sizes: tuple[int, ...], block_sizes: tuple[int, ...]) -> HotFunction:
    return HotFunction(lambda *tensors: _agree(tensors, blocks, (), (), program, sizes, block_sizes))


def _agree(
    tensors: Sequence[Tensor], blocks: int, ints: Sequence[int], floats: Sequence[Tensor], program: str,
    sizes: Sequence[int], block_sizes: Sequence[int],
) -> Tensor:  # fmt: skip
    mask, captured = _mask(program), tensors[blocks:]

    def value(leaf: Expr) -> Any:
        source: Sequence[Any] = captured if leaf.kind == "capture" else ints if leaf.dtype == I32 else floats
        return source[int(leaf.value or 0)]

    device = tensors[0].device
    operands = [computed(part, value, tuple(sizes), device) for part in mask.hoisted]
    return agree(tensors[:blocks], operands, ints, floats, mask.program, sizes, block_sizes)
