"""The references of certification: modified, masked scores from the user's own functions, or from the program.

At compile time the user's original subgraphs are at hand and are the reference, with the derivatives of reverse-mode
autograd. For a shape that first comes up at run time the reference is the program, which was compared with the
functions before. This file evaluates functions on pairs; it knows no plans.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.autograd.forward_ad as fwAD
from torch.overrides import TorchFunctionMode

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.engine.certify.random_inputs import LARGE, draw, only_added
from cudnn_flex_compile.engine.problem import BACKWARD, Problem, TensorSpec
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import environment, evaluate, in_range
from cudnn_flex_compile.scoremod.ir import Program
from cudnn_flex_compile.scoremod.learned import position
from cudnn_flex_compile.scoremod.masks.form import split

# The relative error of a sum of a few terms, where float16 may round an intermediate result.
CHANGE_ERROR = {torch.float64: 2.0**-16, torch.float32: 2.0**-16, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}
HIDDEN = (float("-inf"), 0.0, 0.0)  # a masked pair's score, and its derivatives
Masked = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Derivatives = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]
]


@dataclass(frozen=True, slots=True)
class Sample:
    """Synthetic inputs of a program, and the function that gives its expected scores.

    Attributes:
        operands, ints, floats: as the op takes them.
        masked: (scores [P, R, C], batches [P], heads [P], rows [R], columns [C]) -> [P, R, C], -inf where masked;
            differentiable in the scores, in their dtype.
        autograd: (masked, slope, change) of the same arguments, by reverse-mode autograd: the scores, their derivative
            by the raw score, and their derivative by the captured tensors in some direction. None where `masked` is
            made of ops alone.
        change: the change of scores in that direction by the program; None where nothing is compared.
    """

    operands: list[torch.Tensor]
    ints: list[int]
    floats: list[torch.Tensor]
    masked: Masked
    autograd: Derivatives | None = None
    change: "Change | None" = None

    def derivatives(self, scores: torch.Tensor, *where: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`autograd`, or (masked, slope) by forward-mode differentiation where there is none.

        Forward mode sees no grad mode, but needs no device thread of autograd: such a thread may be waiting for this
        certification.
        """
        if self.autograd is not None:
            return self.autograd(scores, *where)  # pyright: ignore[reportCallIssue]
        with fwAD.dual_level() as level:
            dual = torch_private.make_dual(scores, torch.ones_like(scores), level=level)
            masked, slope = fwAD.unpack_dual(self.masked(dual, *where))  # pyright: ignore[reportCallIssue]
        return masked, torch.zeros_like(masked) if slope is None else slope


@dataclass(frozen=True, slots=True)
class Change:
    """How scores change with captured tensors in some direction, by way of the learned operand.

    Attributes:
        operand: the change of the learned operand; None without one.
        error: its relative error, because the user's functions compute with captured tensors in their dtype.
    """

    operand: torch.Tensor | None
    error: float

    def at(self, where: Sequence[torch.Tensor]) -> torch.Tensor:
        """The change at batches [P], heads [P], rows [R] and columns [C], as [P, R, C] or 0-d."""
        batches, heads, rows, columns = where
        if self.operand is None:
            return torch.zeros((), device=batches.device)
        return pairs_of(self.operand, (batches[:, None, None], heads[:, None, None], rows[:, None], columns))


class Reference(Protocol):
    """The expected scores of a call. `fingerprint` is a text of the functions, for stored verdicts; None without one.
    """

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
        spec: a tensor's layout; None for an integer.
        number: an integer's value now.
        scalar: whether it is a 0-d host tensor that is read as a Python number.
        real: the tensor of the call that is being compiled, if it is an input of the graph.
        limit: the largest integer that is drawn.
        index: whether another tensor is indexed by it, or by a value computed from it: then its real values are used.
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
        joint: score_mod's joint_graph (scoremod/aten.py); None where no gradient is asked for.
        learned: positions in `captured` of the tensors for which `joint` takes directions.
        score_captured, mask_captured: positions in `captured` of each one's last arguments.
        captured: all captured inputs.
        operands: computes the op's operands from the captured tensors and sizes (b, h, sq, skv), and the order in
            which the op gets the keys, [B or 1, Skv], where they are permuted.
        ints, floats: positions in `captured` of the op's scalars.
        fingerprint: the text of both functions, and of the computation of operands.
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
    joint: Callable[..., tuple[torch.Tensor, ...]] | None = None
    learned: tuple[int, ...] = ()
    fingerprint: str | None = None
    source: str = ""

    def sample(self, problem: Problem, generator: torch.Generator, extremes: bool = False) -> Sample:
        infinite = only_added(problem.program)
        values = [self._draw(c, generator, extremes, infinite) for c in self.captured]
        sizes = (*problem.lse_shape, problem.lengths[1])
        joint = self.joint if problem.direction == BACKWARD else None
        directions = [torch.empty_like(values[i]).normal_(generator=generator) for i in self.learned] if joint else []
        moved = [] if extremes else directions
        operands, order, change = self._operands(problem, values, moved, sizes, generator.device)
        for_score = [values[i] for i in self.score_captured]
        for_mask = [values[i] for i in self.mask_captured]

        def value(*of_pair: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (self.score_mod(*of_pair, *for_score),)

        def evaluated(
            function: Callable[..., tuple[torch.Tensor, ...]], scores: torch.Tensor, batches: torch.Tensor,
            heads: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor,
        ) -> tuple[torch.Tensor, ...]:  # fmt: skip
            if order is not None:
                columns = (order[batches] if len(order) > 1 else order.expand(len(batches), -1))[:, columns]
            place = [i.to(torch.int32) for i in (batches, heads, rows, columns)]

            def of_pair(score: torch.Tensor, *place: torch.Tensor) -> tuple[torch.Tensor, ...]:
                return *function(score, *place), self.mask_mod(*place, *for_mask)

            with IndexByTensors():
                *found, visible = _over_pairs(of_pair, columns.dim() > 1)(scores, *place)
            found = (x.to(scores.dtype).expand(scores.shape) for x in found)
            return tuple(torch.where(visible, x, hidden) for x, hidden in zip(found, HIDDEN, strict=False))

        def slopes(*of_pair: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return joint(*of_pair, *for_score, *directions) if joint else ()

        def masked(*given: torch.Tensor) -> torch.Tensor:
            return evaluated(value, *given)[0]  # pyright: ignore[reportCallIssue]

        ints, floats = [int(values[i]) for i in self.ints], [values[i] for i in self.floats]
        autograd = functools.partial(evaluated, slopes) if joint else None
        return Sample(operands, ints, floats, masked, autograd, change)

    def _operands(
        self, problem: Problem, values: Sequence[Any], directions: Sequence[torch.Tensor],
        sizes: tuple[int, int, int, int], device: torch.device,
    ) -> tuple[list[torch.Tensor], torch.Tensor | None, Change | None]:  # fmt: skip
        """The operands, the order of the keys, and how scores change in the directions."""
        if not directions:
            return *self.operands(values, sizes, device), None
        given = list(values)
        with fwAD.dual_level() as level:
            for i, direction in zip(self.learned, directions, strict=True):
                given[i] = torch_private.make_dual(values[i], direction, level=level)
            duals, order = self.operands(given, sizes, device)
            found = [fwAD.unpack_dual(dual) for dual in duals]
        learned = position(problem.program)
        error = max(CHANGE_ERROR[direction.dtype] for direction in directions)
        change = Change(None if learned is None else found[learned].tangent, error)
        return [dual.primal for dual in found], order, change

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
    """Reads `captured[h, q]` with 0-d index tensors as an index op, which vmap and forward-mode AD know.

    torch's TransformGetItemToIndex does the same for calls of flex_attention, but by an autograd.Function. Here indices
    are brought into range, as for operands: the function is evaluated at pairs at which stock attention never evaluates
    it, and on made-up tensors, and on a GPU an index out of range would end all work of the process.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            source, index = args
            indices = list(index) if isinstance(index, (tuple, list)) else [index]
            if all(isinstance(i, (torch.Tensor, int)) for i in indices):
                as_tensors = [torch.as_tensor(i, device=source.device) for i in indices]
                if all(i.dtype in (torch.int32, torch.int64) for i in as_tensors):
                    source, as_tensors = _in_range(source, as_tensors)
                return torch.ops.aten.index(source, as_tensors)
        return func(*args, **(kwargs or {}))


def _in_range(source: torch.Tensor, indices: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A tensor and indices into its first dimensions that are all in range."""
    indexed, rest = source.shape[: len(indices)], source.shape[len(indices) :]
    found, near = in_range(source, indices, indexed)
    return found if found is source else found.view([1] * source.dim()).expand(*[1] * len(indexed), *rest), near


READS = (torch.Tensor.__getitem__, torch.ops.aten.index, torch.ops.aten.index.Tensor)


def _over_pairs(function: Callable[..., Any], own_columns: bool) -> Callable[..., Any]:
    """A function of 0-d tensors, (score, b, h, q, kv), mapped over pairs of batch entry and head, rows and columns.

    Args:
        own_columns: whether each pair of batch entry and head has columns of its own.
    """
    columns = torch.vmap(function, in_dims=(0, None, None, None, 0))
    rows = torch.vmap(columns, in_dims=(0, None, None, 0, None))
    return torch.vmap(rows, in_dims=(0, 0, 0, None, 0 if own_columns else None))
