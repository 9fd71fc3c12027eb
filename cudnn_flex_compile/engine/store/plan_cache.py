"""`CachedPlan` is a certified plan with the layouts that a call of it allocates.

engine/state.py holds them by the keys of calls; kernels/cuda.py runs them.
"""

import functools
from dataclasses import dataclass, field

import torch

from cudnn_flex_compile.engine.launch.memory import Layout
from cudnn_flex_compile.engine.plans.plan import Plan
from cudnn_flex_compile.engine.problem import BACKWARD, TensorSpec, dense


@dataclass(frozen=True)
class CachedPlan:
    """A certified plan.

    Attributes:
        copies: whether query, key, value and the output's gradient must each be copied for it.
        references: the fingerprints of the functions that it was compared with.
    """

    plan: Plan
    copies: tuple[bool, bool, bool, bool]
    references: set[str | None] = field(default_factory=set[str | None], compare=False)

    @functools.cached_property
    def copied(self) -> bool:
        return any(self.copies)

    @functools.cached_property
    def out_stride(self) -> tuple[int, ...]:
        """The strides of the output, by which a backward plan reads it."""
        return self.plan.problem.out.stride

    @functools.cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """The layouts of a call's results: out and stats [B, H, Sq] (empty if not written), or all gradients."""
        problem = self.plan.problem
        if problem.direction == BACKWARD:
            return tuple(spec.layout for spec in self.plan.outputs)
        stats = dense(TensorSpec(problem.lse_shape if problem.stats else (0,), (), torch.float32))
        return self.plan.outputs[0].layout, stats.layout
