"""Plans of a gradient of the log-sum-exp that run one without it, on tensors that they make from theirs.

folded_output.py and widened_values.py are the two ways.
"""

import functools
from abc import abstractmethod
from collections.abc import Callable

from cudnn_flex_compile.engine.plans.plan import Attempt, Plan, Record
from cudnn_flex_compile.engine.problem import Problem
from cudnn_flex_compile.engine.support import refused
from cudnn_flex_compile.reasons import Reason


class WrappedPlan(Plan):
    """A plan around `inner`, one of `inner_problem(problem)`, of any kind."""

    __slots__ = ("inner",)

    def __init__(self, problem: Problem, inner: Plan) -> None:
        super().__init__(problem, f"{inner.strategy}, {self.KIND}")
        self.inner, self.device = inner, inner.device

    @staticmethod
    @abstractmethod
    def takes(problem: Problem) -> bool:
        """Whether this way serves a problem with a gradient of the log-sum-exp."""

    @staticmethod
    @abstractmethod
    def inner_problem(problem: Problem) -> Problem:
        """The problem without a gradient of the log-sum-exp."""

    @classmethod
    def attempts(cls, problem: Problem, every: Callable[[Problem], list[Attempt]]) -> list[Attempt]:
        if problem.tiled or not problem.lse_gradient or not cls.takes(problem):
            return []
        plain = cls.inner_problem(problem)
        if refused(plain, plain.program) is not None:
            return []
        return [
            Attempt(functools.partial(cls._around, problem, inner), inner.last_resort, cls._variant(inner))
            for inner in every(plain)
        ]

    @classmethod
    def _around(cls, problem: Problem, inner: Attempt) -> Plan | Reason:
        plan = inner()
        return plan if isinstance(plan, Reason) else cls(problem, plan)

    @classmethod
    def _variant(cls, inner: Attempt) -> tuple[object, ...] | None:
        return inner.variant and (cls.KIND, *inner.variant)

    @property
    def parts(self) -> tuple[Plan, ...]:
        return (self.inner,)

    @classmethod
    def from_record(cls, problem: Problem, record: Record, restore: Callable[[Problem, Record], Plan]) -> Plan:
        (inner,) = record.parts
        return cls(problem, restore(cls.inner_problem(problem), inner))
