"""The certified plans of this process.

Knows nothing of how they are found.
"""

import atexit
import functools
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, Union

import torch

from cudnn_flex_compile.engine.cache import Cache
from cudnn_flex_compile.engine.memory import Layout
from cudnn_flex_compile.engine.problem import BACKWARD, TensorSpec, dense
from cudnn_flex_compile.reasons import Reason

if TYPE_CHECKING:
    from cudnn_flex_compile.engine.around import Around
    from cudnn_flex_compile.engine.parts import PartsPlan
    from cudnn_flex_compile.engine.plan import Plan
    from cudnn_flex_compile.engine.tile_plan import TilePlan

Runs: TypeAlias = Union["Plan", "PartsPlan", "Around", "TilePlan"]


@dataclass(frozen=True)
class Ready:
    """A certified plan.

    Attributes:
        copies: which of query, key, value and the output's gradient must be copied for it.
        references: fingerprints of what it was compared with.
    """

    plan: Runs
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
        """Of what a call allocates: out and stats [B, H, Sq] (empty if the plan writes none), or of all gradients."""
        problem = self.plan.problem
        if problem.direction == BACKWARD:
            return tuple(spec.layout for spec in self.plan.outputs)
        stats = dense(TensorSpec(problem.lse_shape if problem.stats else (0,), (), torch.float32))
        return self.plan.outputs[0].layout, stats.layout


plans: Cache[Ready | Reason] = Cache(256)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=plans.forsake)  # a child has no part in its parent's CUDA context
atexit.register(plans.release)  # while CUDA and cuDNN are there: what modules hold may be freed after they are gone
