"""The graphs that are tried for a program, in order: each strategy for it as it is, guarded, and expanded.

graph_plan.py builds them; certification decides which one is right.
"""

import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace

from cudnn_flex_compile.engine.graph.lowering import Lowering
from cudnn_flex_compile.engine.graph.strategies import STRATEGIES, Strategy
from cudnn_flex_compile.engine.graph.strategies.dense import NAME as DENSE
from cudnn_flex_compile.engine.graph.strategies.scores import biased, legal_backward
from cudnn_flex_compile.engine.guards import guarded, needs_guard
from cudnn_flex_compile.engine.problem import BACKWARD, Problem
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import Program
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.switches import on


@dataclass(frozen=True, slots=True)
class Variant:
    """A strategy for the program, with its ends guarded (engine/guards.py) or not, with expanded operands or not."""

    strategy: Strategy
    guard: bool
    expand: bool
    last_resort: bool

    @property
    def written(self) -> tuple[Hashable, ...]:
        """The form of the graph, the same at every shape."""
        return self.strategy.name, self.guard, self.expand

    def lowering(self, program: Program, problem: Problem) -> Lowering | Reason:
        """The lowering of the program, or the reason why there is none, or why it is the graph of another variant."""
        program = guarded(program, problem.lengths) if self.guard else program
        found: Lowering | Reason = self.strategy.lower(program, problem.direction == BACKWARD)
        if isinstance(found, Reason):
            return found
        if self.strategy.name == DENSE and split(program.mask).unmasked:
            return Reason(Code.UNSUPPORTED_CALL, "without a mask, dense is the graph of chained")
        if not self.expand:
            return found
        if found.lengths is not None or not _expands(found, problem):
            return Reason(Code.UNSUPPORTED_CALL, "no operand expands")
        return replace(found, expanded=True)


def variants(program: Program, problem: Problem) -> Iterator[Variant]:
    """The variants in order: every strategy for the program as it is, guarded, and, where these give none, expanded."""
    guards = [False, True]
    if problem.direction == BACKWARD and _needs_guard(program, problem):
        guards.remove(False)
    expanded = [False, True] if problem.operands and on("every head") else [False]
    for expand, guard, strategy in itertools.product(expanded, guards, STRATEGIES):
        yield Variant(strategy, guard, expand, last_resort=expand or guard != guards[0])


def _expands(lowering: Lowering, problem: Problem) -> bool:
    """Whether the graph with expanded operands is another one."""
    from cudnn_flex_compile.engine.graph.emit import operand_view

    operands = [n for n in ir.walk(*lowering.leaves) if n.kind == "operand"]
    return any(operand_view(n, problem) != operand_view(n, problem, expanded=True) for n in operands)


def _needs_guard(program: Program, problem: Problem) -> bool:
    score, gradient = biased(program), legal_backward(program)
    if isinstance(score, Reason) or isinstance(gradient, Reason):
        return False
    return needs_guard(ir.program(score, program.mask), gradient, problem.lengths)
