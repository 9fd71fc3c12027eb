"""The made-up data of certification: its kinds (regimes), and the tensors of one call.

A new kind is one `Regime` here. One set of random tensors serves all regimes: each changes a few entries, and puts them
back afterwards.
"""

import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cudnn_flex_compile.engine.guards import TILE
from cudnn_flex_compile.engine.problem import Problem, TensorSpec


@dataclass(frozen=True, slots=True)
class Regime:
    """One kind of data.

    Attributes:
        name: the name in messages.
        shift: a number that is added to every score, by component 0 of all queries and keys.
        outliers: a factor of a few keys.
        groups: the number of distinct keys, which are repeated, so that scores tie; 0 leaves all distinct.
        extremes: whether operands are at their limits (random_inputs.extreme_like), else drawn at random.
        usual: whether models have such data: a function that gives NaN here must give NaN on cuDNN, too. In other
            regimes NaNs come from infinities that cancel, which a rewritten expression changes.
        shapes: whether it has shown faults of single shapes: such a regime is never left out (coverage.py).
    """

    name: str
    shift: float = 0.0
    outliers: float = 1.0
    groups: int = 0
    extremes: bool = False
    usual: bool = False
    shapes: bool = False


REGIMES = (
    Regime("unit normal", usual=True, shapes=True),
    Regime("scores shifted by -100", shift=-100.0, shapes=True),  # values read beyond the ends outweigh all others
    Regime("scores shifted by +100", shift=100.0),
    Regime("outliers of 1e3 in three keys", outliers=1e3),
    Regime("ties", groups=3),
    Regime("operands at their extremes", extremes=True, shapes=True),
)


ALONE = 16  # the first of so many rows has no gradient but that of the log-sum-exp


@dataclass(slots=True)
class Tensors:
    """Inputs and outputs of the plans under test, by role. `grad_lse` is zero where a problem takes no such gradient.

    With a shift, component 0 of all queries and keys is one large number each, which shifts every score. This component
    of dQ and dK is then a sum that cancels, times a large number, which is rounding noise. The others are judged.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grad: torch.Tensor
    grad_lse: torch.Tensor
    out_memory: "Poisoned"
    stats_memory: "Poisoned"

    @property
    def out(self) -> torch.Tensor:
        return self.out_memory.tensor

    @property
    def stats(self) -> torch.Tensor:
        return self.stats_memory.tensor


def drawn(problem: Problem, generator: torch.Generator) -> Tensors:
    """Draws unit normal inputs amid NaNs, and outputs that are poisoned."""
    device = generator.device
    specs = (problem.query, problem.key, problem.value, problem.grad or problem.out)
    query, key, value, grad = (amid_nans(spec, device).normal_(generator=generator) for spec in specs)
    batch, heads, length = problem.lse_shape
    stats = TensorSpec((batch, heads, length, 1), (heads * length, length, 1, 1), torch.float32)
    grad_lse = amid_nans(stats, device).zero_()
    if problem.lse_gradient:  # as large as dO . V, to which it is added
        grad_lse.normal_(generator=generator).mul_(math.sqrt(problem.value.shape[3]))
        grad[:, :, ::ALONE] = 0.0  # rows that the loss reads by their LSE alone: see plans/folded_output.py
    return Tensors(query, key, value, grad, grad_lse, poisoned(problem.out, device), poisoned(stats, device))


@contextmanager
def applied(regime: Regime, tensors: Tensors, scale: float) -> Generator[None]:
    """Changes the tensors to the regime's data, and restores them afterwards."""
    before = [_exchanged(part, value) for part, value in _changes(regime, tensors, scale)]
    yield
    for part, value in before:
        part.copy_(value)


def _exchanged(part: torch.Tensor, value: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes a value into a part, and returns the part and its old value."""
    before = part.clone()
    part.copy_(value) if isinstance(value, torch.Tensor) else part.fill_(value)
    return part, before


def _changes(regime: Regime, t: Tensors, scale: float) -> Iterator[tuple[torch.Tensor, torch.Tensor | float]]:
    """Views of the tensors, each with the value that is written into it."""
    if regime.shift:
        size = math.sqrt(abs(regime.shift) / abs(scale))
        yield t.query[..., 0], size
        yield t.key[..., 0], math.copysign(size, regime.shift * scale)
    length = t.key.shape[2]
    if regime.outliers != 1.0:
        for column in {min(1, length - 1), length // 2, length - 1}:
            yield t.key[:, :, column], t.key[:, :, column] * regime.outliers
    if regime.groups:
        repeated = torch.arange(length, device=t.key.device) % regime.groups
        yield t.key, t.key[:, :, repeated]


# NaNs that no computation gives, by dtype, as integers of its size: an entry that still holds one was not written.
POISON = {
    torch.bfloat16: (torch.int16, 0x7FE5),
    torch.float16: (torch.int16, 0x7F25),
    torch.float32: (torch.int32, 0x7FE5A5A5),
}


# The number of elements before and after a poisoned tensor that nobody may write to, a multiple of cuDNN's alignment.
MARGIN = 512


@dataclass(frozen=True, slots=True)
class Poisoned:
    """A tensor that is written to, its entries and its margins [2, MARGIN] as integers, and all of its memory."""

    tensor: torch.Tensor
    entries: torch.Tensor
    margins: torch.Tensor
    memory: torch.Tensor

    def renew(self) -> None:
        self.memory.fill_(POISON[self.tensor.dtype][1])

    def counts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The number of entries that nobody wrote to, and the number in the margins that somebody did, 0-d each."""
        pattern = POISON[self.tensor.dtype][1]
        return (self.entries == pattern).sum(), (self.margins != pattern).sum()


def poisoned(spec: TensorSpec, device: torch.device) -> Poisoned:
    """A poisoned tensor of a layout, with margins."""
    (integers, pattern), extent = POISON[spec.dtype], _extent(spec)
    memory = torch.full((MARGIN + extent + MARGIN,), pattern, dtype=integers, device=device)
    tensor = memory.view(spec.dtype).as_strided(spec.shape, spec.stride, MARGIN)
    entries = memory.as_strided(spec.shape, spec.stride, MARGIN)
    return Poisoned(tensor, entries, memory.as_strided((2, MARGIN), (MARGIN + extent, 1)), memory)


def amid_nans(spec: TensorSpec, device: torch.device) -> torch.Tensor:
    """An input that is yet to be filled, with NaNs or the largest integers around it.

    Tiles reach beyond the last row: a plan must drop the values that it reads there, whatever they are.
    """
    worst = math.nan if spec.dtype.is_floating_point else spec.dtype is torch.bool or torch.iinfo(spec.dtype).max
    extent, margin = _extent(spec), TILE * max(1, *spec.stride[-2:])
    memory = torch.full((margin + extent + margin,), worst, dtype=spec.dtype, device=device)
    return memory.as_strided(spec.shape, spec.stride, margin)


def surrounded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of an input amid NaNs."""
    return amid_nans(TensorSpec.of(tensor), tensor.device).copy_(tensor)


def _extent(spec: TensorSpec) -> int:
    return 1 + sum((n - 1) * step for n, step in zip(spec.shape, spec.stride, strict=True))
