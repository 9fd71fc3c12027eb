"""A backward with a gradient of the log-sum-exp, by a plan without one that gets another output.

cuDNN computes delta = dO . O for each row, and with it P * (dP - delta), the gradient of the modified score. With a
gradient of the log-sum-exp it is P * (dP - delta + dLSE). The plan gets O' = O - dO * dLSE / |dO|^2, for which its
delta is delta - dLSE; dP and dV do not read O, and stay the same. So any plan serves, at the cost of one pass over O
and dO. O' may be large, which bfloat16 holds and float16 does not.

Where a row of dO is zero, dO' has two tiny entries instead, in columns 0 and 1. They change dP by 2**-100 at most. In
dV, entries of these two columns that are no larger than the tiny ones can make them are set to zero, so that dV is zero
for a loss that reads only the log-sum-exp.

The rounding of O' to bfloat16 would change delta for all pairs of a row alike, and the gradient of a learned bias adds
these changes up. So one entry of O', of those that count least, is changed to make up for the rounding of all.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cudnn_flex_compile.engine.plans.plan import Attempt, Plan, Record
from cudnn_flex_compile.engine.problem import Problem
from cudnn_flex_compile.engine.tiles.tile_list import TileList
from cudnn_flex_compile.reasons import Reason

TINY = 2.0**-100
SECOND = 2.0**-8  # the second tiny entry, relative to the first
LEAST = 2.0**-12  # the least entry of dO' by which O' can be divided, relative to the row's largest
ROWS = 16  # rows of one block of threads


class FoldedPlan(Plan):
    """A plan around `inner`, one of `inner_problem(problem)`, of any kind."""

    KIND = "folded"
    __slots__ = ("inner",)

    def __init__(self, problem: Problem, inner: Plan) -> None:
        super().__init__(problem, f"{inner.strategy}, {self.KIND}")
        self.inner, self.device = inner, inner.device

    @staticmethod
    def inner_problem(problem: Problem) -> Problem:
        """The problem without a gradient of the log-sum-exp."""
        return replace(problem, grad=problem.out, lse_gradient=False)

    @classmethod
    def attempts(cls, problem: Problem, every: Callable[[Problem], list[Attempt]]) -> list[Attempt]:
        if problem.tiled or not problem.lse_gradient:
            return []
        return [
            Attempt(functools.partial(cls._around, problem, inner), inner.last_resort, cls._variant(inner))
            for inner in every(cls.inner_problem(problem))
        ]

    @classmethod
    def _around(cls, problem: Problem, inner: Attempt) -> Plan | Reason:
        plan = inner()
        return plan if isinstance(plan, Reason) else cls(problem, plan)

    @classmethod
    def _variant(cls, inner: Attempt) -> tuple[Hashable, ...] | None:
        return inner.variant and (cls.KIND, *inner.variant)

    @property
    def parts(self) -> tuple[Plan, ...]:
        return (self.inner,)

    @classmethod
    def from_record(cls, problem: Problem, record: Record, restore: Callable[[Problem, Record], Plan]) -> Plan:
        (inner,) = record.parts
        return cls(problem, restore(cls.inner_problem(problem), inner))

    def run(
        self, tensors: Sequence[Tensor], operands: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor],
        tiles: TileList | None = None,
    ) -> None:  # fmt: skip
        query, key, value, out, stats, grad, grad_lse, *gradients = tensors
        given = [self.problem.out.empty(out.device) for _ in range(2)]
        fold(out, grad, grad_lse.view(out.shape[:3]), *given)
        self.inner.run((query, key, value, given[0], stats, given[1], *gradients), operands, ints, floats)
        clear(gradients[2], out.shape[1] // value.shape[1] * out.shape[2])


def fold(out: Tensor, grad: Tensor, grad_lse: Tensor, folded: Tensor, folded_grad: Tensor) -> None:
    """Writes O' and dO' of `out`, `grad` and `grad_lse`.

    Args:
        out, grad, folded, folded_grad: [B, H, S, D], any strides with a last one of 1.
        grad_lse: the gradient of the natural log-sum-exp, [B, H, S], float32, any strides.
    """
    if not out.is_cuda:
        _fold_on_host(out, grad, grad_lse, folded, folded_grad)
        return
    from cudnn_flex_compile.engine.plans.fold_kernel import fold_rows

    batch, heads, rows, dim = out.shape
    grid = (math.ceil(rows / ROWS), batch * heads)
    strides = [s for t in (out, grad, grad_lse, folded, folded_grad) for s in t.stride()[:3]]
    fold_rows[grid](  # pyright: ignore
        out, grad, grad_lse, folded, folded_grad, heads, rows, dim, *strides, ROWS=ROWS,
        DIM=1 << (dim - 1).bit_length(), TINY=TINY, SECOND=SECOND, LEAST=LEAST,
    )  # fmt: skip


def clear(grad_value: Tensor, rows: int) -> None:
    """Zeroes the entries of dV, [B, Hkv, Skv, Dv], that are no larger than tiny entries of dO' can make them.

    These are in `rows` rows at most, whose weights, rounded, are less than 2 each. A NaN stays one.
    """
    touched = grad_value[..., :2]
    torch.hardshrink(touched, 2 * rows * TINY, out=touched)


def _fold_on_host(out: Tensor, grad: Tensor, grad_lse: Tensor, folded: Tensor, folded_grad: Tensor) -> None:
    o, do, dlse = out.float(), grad.float(), grad_lse[..., None]
    size = do.abs().amax(-1, keepdim=True)
    small, size = size < TINY, size.clamp(min=TINY)
    place = torch.arange(grad.shape[3], device=grad.device)
    tiny = torch.where(place == 0, 1.0, torch.where(place == 1, SECOND, 0.0))
    unit = torch.where(small, tiny, do / size)
    share = dlse / (size * unit.square().sum(-1, keepdim=True))
    given = torch.where(small & (dlse != 0), unit * TINY, do)
    rounded = (o - unit * share).to(folded.dtype).float()
    left = (given * rounded - do * o).sum(-1, keepdim=True) + dlse
    weight = torch.where(given.abs() >= size * LEAST, (given * rounded).abs(), math.inf)
    chosen = (place == weight.argmin(-1, keepdim=True)) & (given != 0)
    folded.copy_(torch.where(chosen, rounded - left / given, rounded))
    folded_grad.copy_(given)
