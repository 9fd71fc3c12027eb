"""What a plan is compared with: modified, masked scores from the user's own functions, or from the program.

Knows nothing of cuDNN. The user's original subgraphs are the reference wherever they are at hand (at compile
time); for a shape that only comes up later it is the program, which was compared with them then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from cudnn_flex_compile.engine.draws import LARGE, draw, only_added
from cudnn_flex_compile.engine.problem import Problem, TensorSpec
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import environment, evaluate, in_range
from cudnn_flex_compile.scoremod.ir import Program
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.text import parse

Masked = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Sample:
    """Synthetic inputs of a program, and what its scores should become.

    Attributes:
        operands, ints, floats: as the op takes them.
        masked: (scores [P, R, C], batches [P], heads [P], rows [R], columns [C]) -> [P, R, C], -inf where masked;
            differentiable in the scores, in their dtype.
    """

    operands: list[torch.Tensor]
    ints: list[int]
    floats: list[torch.Tensor]
    masked: Masked


class Reference(Protocol):
    """`fingerprint` is a text of what it computes, for verdicts that last; None if it has none."""

    @property
    def fingerprint(self) -> str | None: ...

    def sample(self, problem: Problem, generator: torch.Generator, extremes: bool = False) -> Sample: ...


class ProgramReference:
    """The program itself, through the interpreter."""

    fingerprint = "the program"

    def __init__(self, program: Program) -> None:
        self.program = program
        leaves = [n for n in ir.walk(program.score, program.mask) if n.kind == "scalar"]
        self.ints = 1 + max((int(n.value or 0) for n in leaves if n.dtype == ir.I32), default=-1)
        self.floats = 1 + max((int(n.value or 0) for n in leaves if n.dtype == ir.F32), default=-1)

    def sample(self, problem: Problem, generator: torch.Generator, extremes: bool = False) -> Sample:
        length, infinite = problem.lengths[1], only_added(self.program)
        hiding = {int(bias.value or 0) for bias in split(self.program.mask).biases}
        operands = [
            draw(spec, generator, length, extremes, infinite, i in hiding) for i, spec in enumerate(problem.operands)
        ]
        ints = [length * (i % 2) if extremes else max(1, length // 3) for i in range(self.ints)]
        floats = [torch.tensor(LARGE if extremes else 1.5, dtype=torch.float64)] * self.floats

        def masked(
            scores: torch.Tensor, batches: torch.Tensor, heads: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
        ) -> torch.Tensor:
            near = (batches[:, None, None], heads[:, None, None], rows[:, None], columns)
            indices = {axis: i.to(torch.int32) for axis, i in zip(ir.AXES, near, strict=True)}
            there = {i: pairs_of(operand, near) for i, operand in enumerate(operands)}
            numbers = {i: float(t) for i, t in enumerate(floats)}
            leaf = environment(scores, indices, there, dict(enumerate(ints)), numbers)
            high = scores.dtype == torch.float64
            mask = evaluate(self.program.mask, leaf, high)
            return torch.where(mask, evaluate(self.program.score, leaf, high), float("-inf")).expand(scores.shape)

        return Sample(operands, ints, floats, masked)


def pairs_of(operand: torch.Tensor, where: Sequence[torch.Tensor]) -> torch.Tensor:
    """A broadcastable [B, H, Sq, Skv] operand at the indices of its four axes, which broadcast with each other."""
    return operand[tuple([i if n > 1 else torch.zeros_like(i) for i, n in zip(where, operand.shape, strict=True)])]


@dataclass(frozen=True, slots=True)
class CapturedValue:
    """A captured input of the user's functions: its layout or number, and real values where there are any.

    Attributes:
        spec: of a tensor; None for an integer.
        number: an integer's value now.
        scalar: whether it is a 0-d host tensor that is read as a Python number.
        real: the tensor of the call that is being compiled, if it is an input of the graph.
        limit: integers are drawn from [0, limit].
        index: whether another tensor is read at it, or at what is computed from it: such values stay what they are.
    """

    spec: TensorSpec | None
    number: int = 0
    scalar: bool = False
    real: torch.Tensor | None = None
    limit: int = 1
    index: bool = False


@dataclass(frozen=True, slots=True)
class SubgraphReference:
    """The user's original score_mod and mask_mod.

    Attributes:
        score_mod, mask_mod: take (score, b, h, q, kv, *captured) and (b, h, q, kv, *captured).
        score_captured, mask_captured: positions in `captured` of each one's last arguments.
        captured: all captured inputs.
        operands: computes the op's operands from the captured tensors and sizes (b, h, sq, skv), and the order in
            which the op gets the keys, [B or 1, Skv], where it is another.
        ints, floats: positions in `captured` of the op's scalars.
        fingerprint: of both functions, and of how operands are computed.
        source: where in the user's code the call is.
    """

    score_mod: Callable[..., torch.Tensor]
    mask_mod: Callable[..., torch.Tensor]
    score_captured: tuple[int, ...]
    mask_captured: tuple[int, ...]
    captured: tuple[CapturedValue, ...]
    operands: Callable[
        [Sequence[Any], tuple[int, int, int, int], torch.device], tuple[list[torch.Tensor], torch.Tensor | None]
    ]
    ints: tuple[int, ...] = ()
    floats: tuple[int, ...] = ()
    fingerprint: str | None = None
    source: str = ""

    def sample(self, problem: Problem, generator: torch.Generator, extremes: bool = False) -> Sample:
        infinite = only_added(parse(problem.program))
        values = [self._draw(c, generator, extremes, infinite) for c in self.captured]
        sizes = (*problem.lse_shape, problem.lengths[1])
        operands, order = self.operands(values, sizes, generator.device)
        for_score = [values[i] for i in self.score_captured]
        for_mask = [values[i] for i in self.mask_captured]

        def of_pair(score: torch.Tensor, *place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.score_mod(score, *place, *for_score), self.mask_mod(*place, *for_mask)

        def masked(
            scores: torch.Tensor, batches: torch.Tensor, heads: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
        ) -> torch.Tensor:
            if order is not None:
                columns = (order[batches] if len(order) > 1 else order.expand(len(batches), -1))[:, columns]
            place = [i.to(torch.int32) for i in (batches, heads, rows, columns)]
            with IndexByTensors():
                modified, visible = _over_pairs(of_pair, columns.dim() > 1)(scores, *place)
            modified = modified.to(scores.dtype).expand(scores.shape)
            return torch.where(visible, modified, float("-inf"))

        ints = [int(values[i]) for i in self.ints]
        return Sample(operands, ints, [values[i] for i in self.floats], masked)

    def _draw(self, captured: CapturedValue, generator: torch.Generator, extremes: bool, infinite: bool) -> Any:
        if captured.spec is None:
            return captured.number
        if captured.scalar:
            return captured.real if captured.real is not None else torch.tensor(1.5, dtype=captured.spec.dtype)
        extremes = extremes and not captured.index
        if captured.real is not None and not captured.spec.dtype.is_floating_point and not extremes:
            return captured.real  # indices into other tensors: only real ones are known to be in range
        return draw(captured.spec, generator, captured.limit, extremes, infinite)


class IndexByTensors(TorchFunctionMode):
    """`captured[h, q]` with 0-d index tensors as an index op, which vmap and forward-mode AD know.

    What torch's TransformGetItemToIndex does for the calls of flex_attention, less its autograd.Function. No index is
    out of range: the function is evaluated at pairs at which stock attention never evaluates it, and of tensors that
    are made up; on a GPU an index out of range would end all work of the process there. Operands are computed alike.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            source, index = args
            indices = list(index) if isinstance(index, (tuple, list)) else [index]
            if all(isinstance(i, (torch.Tensor, int)) for i in indices):
                as_tensors = [torch.as_tensor(i, device=source.device) for i in indices]
                if len(indices) == source.dim() and all(i.dtype in (torch.int32, torch.int64) for i in as_tensors):
                    source, as_tensors = in_range(source, as_tensors, source.shape)
                return torch.ops.aten.index(source, as_tensors)
        return func(*args, **(kwargs or {}))


READS = (torch.Tensor.__getitem__, torch.ops.aten.index, torch.ops.aten.index.Tensor)


def _over_pairs(function: Callable[..., Any], own_columns: bool) -> Callable[..., Any]:
    """A function of 0-d tensors, (score, b, h, q, kv), mapped over pairs of batch entry and head, rows and columns.

    Args:
        own_columns: whether each pair of batch entry and head has columns of its own.
    """
    columns = torch.vmap(function, in_dims=(0, None, None, None, 0))
    rows = torch.vmap(columns, in_dims=(0, None, None, 0, None))
    return torch.vmap(rows, in_dims=(0, 0, 0, None, 0 if own_columns else None))
