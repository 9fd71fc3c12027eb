"""A backward beside a learned operand, by a graph that also writes the gradient of the modified score at each pair.

cuDNN's own gradient of a bias is right for a plain score under a band, in bfloat16. Elsewhere the graph adds the
operand to the score as it adds any other, and the gradient that its score_mod's backward is given leaves it by a node
of its own, in float32. torch sums that over the batch entries and heads that share the operand. cuDNN accepts such
nodes (tests/deviceless/test_pair_gradient.py), and certification says whether its numbers are right.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cudnn_flex_compile.engine.launch.memory import empty
from cudnn_flex_compile.engine.plans.plan import Attempt, Plan, Record
from cudnn_flex_compile.engine.problem import BACKWARD, Problem
from cudnn_flex_compile.engine.tiles.tile_list import TileList
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.scoremod.ir import SCORE, Program
from cudnn_flex_compile.scoremod.learned import added, without_bias
from cudnn_flex_compile.scoremod.masks.form import split

# The nodes by which the gradient may leave the graph, each with what its result is multiplied with.
FORMS = {"identity": 1.0, "add": 0.5}


def needed(program: Program, dtype: torch.dtype) -> bool:
    """Whether cuDNN's own gradient of the learned operand would be wrong, or so would the output beside it.

    Beside a score_mod its gradient was off by 90%, and under a predicate the output by 70%; in float16 the gradient of
    T5's table by 2.04 times what stock's is (one H200, cuDNN 9.19, S 1000, D 128).
    """
    rest, operand = without_bias(program.score)
    return operand is not None and not (rest is SCORE and split(program.mask).skips_tiles and dtype is torch.bfloat16)


def running(program: Program, dtype: torch.dtype) -> Program:
    """The program that graphs run: with the learned operand as any other where that is needed."""
    return added(program) if needed(program, dtype) else program


class PairGradientPlan(Plan):
    """A plan around `inner`, one of `inner_problem(problem, form)`."""

    KIND = "pairs"
    __slots__ = ("_factor", "_form", "inner")

    def __init__(self, problem: Problem, form: str, inner: Plan) -> None:
        super().__init__(problem, f"{inner.strategy}, {self.KIND}")
        self.inner, self.device, self._form, self._factor = inner, inner.device, form, FORMS[form]

    @staticmethod
    def inner_problem(problem: Problem, form: str) -> Problem:
        """The problem with a gradient for each pair, that leaves the graph by a node of this form."""
        return replace(problem, program=added(problem.program), pairs=form)

    @classmethod
    def attempts(cls, problem: Problem, every: Callable[[Problem], list[Attempt]]) -> list[Attempt]:
        """No graph is tried in a form that does more work: where the first ones are wrong, most others are, too."""
        other = problem.tiled or problem.lse_gradient or problem.direction != BACKWARD
        if other or not needed(problem.program, problem.query.dtype):
            return []
        return [
            Attempt(functools.partial(cls._around, problem, form, inner), variant=cls._variant(form, inner))
            for form in FORMS for inner in every(cls.inner_problem(problem, form)) if not inner.last_resort
        ]  # fmt: skip

    @classmethod
    def _around(cls, problem: Problem, form: str, inner: Attempt) -> Plan | Reason:
        plan = inner()
        return plan if isinstance(plan, Reason) else cls(problem, form, plan)

    @classmethod
    def _variant(cls, form: str, inner: Attempt) -> tuple[Hashable, ...] | None:
        return inner.variant and (cls.KIND, form, *inner.variant)

    @property
    def parts(self) -> tuple[Plan, ...]:
        return (self.inner,)

    def to_record(self) -> Record:
        return replace(super().to_record(), details={"form": self._form})

    @classmethod
    def from_record(cls, problem: Problem, record: Record, restore: Callable[[Problem, Record], Plan]) -> Plan:
        form, (inner,) = record.details["form"], record.parts
        return cls(problem, form, restore(cls.inner_problem(problem, form), inner))

    def run(
        self, tensors: Sequence[Tensor], operands: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor],
        tiles: TileList | None = None,
    ) -> None:  # fmt: skip
        *given, gradient = tensors
        pairs = empty(*self.inner.outputs[-1].layout).zero_()  # nothing is written to tiles that are skipped
        self.inner.run((*given, pairs), operands, ints, floats)
        shared = [axis for axis in (0, 1) if gradient.shape[axis] < pairs.shape[axis]]
        total = pairs.sum(shared, keepdim=True) if shared else pairs
        torch.mul(total, self._factor, out=gradient)
