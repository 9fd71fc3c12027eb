"""A backward with a gradient of the log-sum-exp, by a plan without one on values with more columns.

With V' = [V, 1], dO' = [dO, dLSE] and O' = [O, 0], the products dO' . V' are dP + dLSE, and delta = dO' . O' stays the
same. So P * (dP' - delta') is the gradient of the modified score, and dV is the first columns of dV'. Any plan serves,
and no row vectors are needed, which the backward of most architectures cannot take. It costs copies of three tensors,
and cuDNN may refuse the head dims. It is for float16, for which a folded output (folded_output.py) may be too large.
Where the row term inside of the score_mod (engine/graph/strategies/scores.py) is accepted and right, that is tried
first.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from cudnn_flex_compile.engine.plans.folded_output import FoldedPlan
from cudnn_flex_compile.engine.plans.wrapped import WrappedPlan
from cudnn_flex_compile.engine.problem import Problem, TensorSpec, output_specs, strides_like
from cudnn_flex_compile.engine.tiles.tile_list import TileList

# The columns that are added to V; their number is a multiple that cuDNN takes. dLSE is the sum of the new entries of
# dO' times these, each the remainder of the ones before: 24 bits of bfloat16, and more than the range of float16.
ONES = (1024.0, 1.0, 1.0)
MORE = 8


class WidenedPlan(WrappedPlan):
    KIND = "wider values"

    @staticmethod
    def takes(problem: Problem) -> bool:
        return not FoldedPlan.takes(problem)

    @staticmethod
    def inner_problem(problem: Problem) -> Problem:
        dq, dk, dv = output_specs(problem)
        more = {name: _wide(getattr(problem, name)) for name in ("value", "out")}
        grad = _wide(problem.grad or problem.out)
        return replace(problem, **more, grad=grad, gradients=(dq, dk, _wide(dv)), lse_gradient=False)

    def run(
        self, tensors: Sequence[torch.Tensor], operands: Sequence[torch.Tensor], ints: Sequence[int],
        floats: Sequence[torch.Tensor], tiles: TileList | None = None,
    ) -> None:  # fmt: skip
        query, key, value, out, stats, grad, _, grad_lse, dq, dk, dv = tensors
        dim, wide = value.shape[3], self.inner.problem
        wide_value, wide_out, wide_grad = (_padded(t, s) for t, s in zip(
            (value, out, grad), (wide.value, wide.out, wide.grad or wide.out), strict=True))  # fmt: skip
        left = grad_lse.view(grad.shape[:3])
        for column, one in enumerate(ONES, start=dim):
            wide_value[..., column] = one
            wide_grad[..., column] = left / one
            left = left - wide_grad[..., column].float() * one
        wide_dv = self.inner.outputs[2].empty(value.device)
        given = (query, key, wide_value, wide_out, stats, wide_grad, dq, dk, wide_dv)
        self.inner.run(given, operands, ints, floats)
        dv.copy_(wide_dv[..., :dim])


def _wide(spec: TensorSpec) -> TensorSpec:
    shape = (*spec.shape[:3], spec.shape[3] + MORE)
    return TensorSpec(shape, strides_like(shape, spec.stride), spec.dtype)


def _padded(tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The tensor in a layout of more columns, which are zero."""
    wide = spec.empty(tensor.device)
    wide[..., : tensor.shape[3]] = tensor
    wide[..., tensor.shape[3] :] = 0.0
    return wide
