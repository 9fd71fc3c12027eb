"""Values of operands and captured tensors, made up at random or at their extremes.

Certification and autotune fill tensors with them; a caller says whether infinities may be among the values.
"""

import torch

from cudnn_flex_compile.engine.problem import TensorSpec
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, Expr, Program

LARGE, INFINITE = 1e3, float("-inf")


def draw(
    spec: TensorSpec, generator: torch.Generator, limit: int, extremes: bool, infinite: bool, hiding: bool = False
) -> torch.Tensor:
    """A tensor of a layout, filled with made-up values.

    Args:
        limit: the largest integer; the least is 0.
        extremes: whether values are those of extreme_like, else of random_like.
        infinite: whether extreme floats may be -inf.
        hiding: whether the tensor is a bias of 0 and -inf that stands for a predicate of the user.
    """
    if not hiding:
        return extreme_like(spec, generator, limit, infinite) if extremes else random_like(spec, generator, limit)
    predicate = TensorSpec(spec.shape, spec.stride, torch.bool)
    visible = extreme_like(predicate, generator, 1) if extremes else random_like(predicate, generator, 1)
    return spec.empty(generator.device).fill_(0.0).masked_fill_(~visible, INFINITE)


def random_like(spec: TensorSpec, generator: torch.Generator, limit: int) -> torch.Tensor:
    """Unit normal floats; integers in [0, limit], as far as the dtype goes; coin flips for booleans."""
    tensor = spec.empty(generator.device)
    if tensor.dtype.is_floating_point:
        return tensor.normal_(generator=generator)
    if tensor.dtype == torch.bool:
        return tensor.bernoulli_(0.5, generator=generator)
    return tensor.random_(0, min(limit + 1, torch.iinfo(tensor.dtype).max), generator=generator)


def extreme_like(spec: TensorSpec, generator: torch.Generator, limit: int, infinite: bool = False) -> torch.Tensor:
    """Values that calls seldom hold.

    Integers are at the ends of [0, limit] and at tile edges. Floats are a thousand times as large as unit normal ones,
    some are zero, and if `infinite` some are -inf, where the last dimension is long (columns, not heads). Booleans are
    true once, nowhere, or everywhere but once.
    """
    tensor, last = random_like(spec, generator, limit), spec.shape[-1] if spec.shape else 1
    place = torch.arange(tensor.numel(), device=tensor.device).view(spec.shape)
    if tensor.dtype == torch.bool:
        kind, column = place // last % 3, place % last
        return tensor.copy_(torch.where(kind == 0, column == 0, (kind == 2) & (column != last - 1)))
    if not tensor.dtype.is_floating_point:
        edges = [0, limit, 1, limit - 1, 64, 128, limit // 2, 127, limit - 64]
        top = min(limit, torch.iinfo(tensor.dtype).max - 1)
        values = torch.tensor([min(max(edge, 0), top) for edge in edges], device=tensor.device, dtype=tensor.dtype)
        return tensor.copy_(values[place % len(edges)])
    tensor.mul_(LARGE).masked_fill_(place % 8 == 2, 0.0)
    return tensor.masked_fill_(place % last % 8 == 5, INFINITE) if infinite and last > 64 else tensor


def only_added(program: Program) -> bool:
    """Whether operands are only added to the score, as biases of -inf columns are.

    In products, and in choices that leave them out, 0 * inf makes gradients NaN in stock kernels, too.
    """
    others = [term for term in _terms(program.score) if term.kind != "operand"]
    return not any(node.kind == "operand" and node.dtype == F32 for node in ir.walk(*others))


def _terms(score: Expr) -> list[Expr]:
    return [term for arg in score.args for term in _terms(arg)] if score.kind == "add" else [score]
