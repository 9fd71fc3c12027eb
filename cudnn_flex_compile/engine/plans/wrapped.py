"""Plans of a gradient of the log-sum-exp that run one without it, on tensors that they make from theirs.

Knows nothing of how plans are built. engine/plans/folded_output.py and engine/plans/widened_values.py are the two ways.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from cudnn_flex_compile.engine.problem import Error, Problem, output_specs


class WrappedPlan(ABC):
    """A plan (engine/plans/graph_plan.py) around `inner`, one of `inner_problem(problem)`. FIRST: whether this way is
    tried before plans that take the gradient of the log-sum-exp themselves.
    """

    NAME: ClassVar[str]
    FIRST: ClassVar[bool]
    __slots__ = ("device", "errors", "inner", "outputs", "problem", "strategy")

    def __init__(self, problem: Problem, inner: Any) -> None:
        self.problem, self.inner, self.device = problem, inner, inner.device
        self.outputs = output_specs(problem)
        self.strategy = f"{inner.strategy}, {self.NAME}"
        self.errors: tuple[Error, ...] = ()

    @staticmethod
    @abstractmethod
    def takes(problem: Problem) -> bool:
        """Whether this is a way for a problem with a gradient of the log-sum-exp."""

    @staticmethod
    @abstractmethod
    def inner_problem(problem: Problem) -> Problem:
        """The problem without a gradient of the log-sum-exp."""

    @abstractmethod
    def run(
        self, tensors: Sequence[torch.Tensor], operands: Sequence[torch.Tensor], ints: Sequence[int],
        floats: Sequence[torch.Tensor],
    ) -> None:  # fmt: skip
        """As Plan.run."""
