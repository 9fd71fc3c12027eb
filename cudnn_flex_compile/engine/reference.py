"""What a plan is compared with: modified, masked scores from the user's own functions, or from the program.

Knows nothing of cuDNN. The user's original subgraphs are the reference wherever they are at hand (at compile
time); for a shape that only comes up later it is the program, which was compared with them then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from cudnn_flex_compile.engine.problem import Problem, TensorSpec
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import environment, evaluate
from cudnn_flex_compile.scoremod.ir import Program
from cudnn_flex_compile.scoremod.masks.form import split

Masked = Callable[[torch.Tensor, int, int, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Sample:
    """Synthetic inputs of a program, and what its scores should become.

    Attributes:
        operands, ints, floats: as the op takes them.
        masked: (scores [R, C], b, h, rows [R], columns [C]) -> [R, C], -inf where masked; differentiable in
            the scores, in their dtype.
    """

    operands: list[torch.Tensor]
    ints: list[int]
    floats: list[torch.Tensor]
    masked: Masked


class Reference(Protocol):
    """`fingerprint` is a text of what it computes, for verdicts that last; None if it has none."""

    @property
    def fingerprint(self) -> str | None: ...

    def sample(self, problem: Problem, generator: torch.Generator) -> Sample: ...


def random_like(spec: TensorSpec, generator: torch.Generator, limit: int) -> torch.Tensor:
    """Unit normal floats; integers in [0, limit], as far as the dtype goes; coin flips for booleans."""
    tensor = spec.empty(generator.device)
    if tensor.dtype.is_floating_point:
        return tensor.normal_(generator=generator)
    if tensor.dtype == torch.bool:
        return tensor.bernoulli_(0.5, generator=generator)
    return tensor.random_(0, min(limit + 1, torch.iinfo(tensor.dtype).max), generator=generator)


class ProgramReference:
    """The program itself, through the interpreter."""

    fingerprint = "the program"

    def __init__(self, program: Program) -> None:
        self.program = program
        leaves = [n for n in ir.walk(program.score, program.mask) if n.kind == "scalar"]
        self.ints = 1 + max((int(n.value or 0) for n in leaves if n.dtype == ir.I32), default=-1)
        self.floats = 1 + max((int(n.value or 0) for n in leaves if n.dtype == ir.F32), default=-1)

    def sample(self, problem: Problem, generator: torch.Generator) -> Sample:
        operands = [random_like(spec, generator, problem.lengths[1]) for spec in problem.operands]
        for bias in split(self.program.mask).biases:
            position = int(bias.value or 0)
            operands[position] = torch.where(operands[position] > 0, 0.0, float("-inf")).to(operands[position].dtype)
        ints = [max(1, problem.lengths[1] // 3)] * self.ints
        floats = [torch.tensor(1.5, dtype=torch.float64)] * self.floats

        def masked(scores: torch.Tensor, b: int, h: int, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
            where = {"b": b, "h": h, "q": rows[:, None], "k": cols[None, :]}
            indices = {axis: torch.as_tensor(i, dtype=torch.int32, device=scores.device) for axis, i in where.items()}
            near = {i: slice_operand(t, b, h, rows, cols) for i, t in enumerate(operands)}
            numbers = {i: float(t) for i, t in enumerate(floats)}
            leaf = environment(scores, indices, near, dict(enumerate(ints)), numbers)
            high = scores.dtype == torch.float64
            mask = evaluate(self.program.mask, leaf, high)
            return torch.where(mask, evaluate(self.program.score, leaf, high), float("-inf")).expand(scores.shape)

        return Sample(operands, ints, floats, masked)


def slice_operand(tensor: torch.Tensor, b: int, h: int, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """The part of a broadcastable [B, H, Sq, Skv] operand for one head, some rows and columns: [R or 1, C or 1]."""
    part = tensor[b if tensor.shape[0] > 1 else 0, h if tensor.shape[1] > 1 else 0]
    part = part[rows.long()] if part.shape[0] > 1 else part
    return part[:, cols.long()] if part.shape[1] > 1 else part


@dataclass(frozen=True, slots=True)
class CapturedValue:
    """A captured input of the user's functions: its layout or number, and real values where there are any.

    Attributes:
        spec: of a tensor; None for an integer.
        number: an integer's value now.
        scalar: whether it is a 0-d host tensor that is read as a Python number.
        real: the tensor of the call that is being compiled, if it is an input of the graph.
        limit: integers are drawn from [0, limit].
    """

    spec: TensorSpec | None
    number: int = 0
    scalar: bool = False
    real: torch.Tensor | None = None
    limit: int = 1


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

    def sample(self, problem: Problem, generator: torch.Generator) -> Sample:
        values = [self._draw(c, generator) for c in self.captured]
        sizes = (*problem.lse_shape, problem.lengths[1])
        operands, order = self.operands(values, sizes, generator.device)
        for_score = [values[i] for i in self.score_captured]
        for_mask = [values[i] for i in self.mask_captured]

        def masked(scores: torch.Tensor, b: int, h: int, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
            if order is not None:
                cols = order[b if len(order) > 1 else 0][cols.long()].to(torch.int32)
            place = [torch.as_tensor(i, dtype=torch.int32, device=scores.device) for i in (b, h)]
            with IndexByTensors():
                modified = _over_pairs(self.score_mod, True, for_score)(scores, *place, rows, cols, *for_score)
                visible = _over_pairs(self.mask_mod, False, for_mask)(*place, rows, cols, *for_mask)
            modified = modified.to(scores.dtype).expand(scores.shape)
            return torch.where(visible, modified, float("-inf"))

        ints = [int(values[i]) for i in self.ints]
        return Sample(operands, ints, [values[i] for i in self.floats], masked)

    def _draw(self, captured: CapturedValue, generator: torch.Generator) -> Any:
        if captured.spec is None:
            return captured.number
        if captured.scalar:
            return captured.real if captured.real is not None else torch.tensor(1.5, dtype=captured.spec.dtype)
        if captured.real is not None and not captured.spec.dtype.is_floating_point:
            return captured.real  # indices into other tensors: only real ones are known to be in range
        return random_like(captured.spec, generator, captured.limit)


class IndexByTensors(TorchFunctionMode):
    """`captured[h, q]` with 0-d index tensors as an index op, which vmap and forward-mode AD know.

    What torch's TransformGetItemToIndex does for the calls of flex_attention, less its autograd.Function.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            source, index = args
            indices = list(index) if isinstance(index, (tuple, list)) else [index]
            if all(isinstance(i, (torch.Tensor, int)) for i in indices):
                as_tensors = [torch.as_tensor(i, device=source.device) for i in indices]
                return torch.ops.aten.index(source, as_tensors)
        return func(*args, **(kwargs or {}))


def _over_pairs(function: Callable[..., torch.Tensor], takes_score: bool, captured: list[Any]) -> Callable[..., Any]:
    """A 0-d function mapped over rows and columns."""
    rest = (None,) * len(captured)
    inner = ((0,) if takes_score else ()) + (None, None, None, 0, *rest)
    outer = ((0,) if takes_score else ()) + (None, None, 0, None, *rest)
    return torch.vmap(torch.vmap(function, in_dims=inner), in_dims=outer)
