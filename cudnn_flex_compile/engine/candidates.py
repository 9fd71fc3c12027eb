"""What builds a plan of a problem, in the order of trial: parts where they are faster, then each strategy;
for calls by tile lists, the one of their tiles.

Knows nothing of whether a plan is right, nor of which one is kept.
"""

import functools
import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace

from cudnn_flex_compile.engine.graph.lowering import Lowering
from cudnn_flex_compile.engine.graph.strategies import STRATEGIES, Strategy
from cudnn_flex_compile.engine.graph.strategies.dense import NAME as DENSE
from cudnn_flex_compile.engine.graph.strategies.scores import biased, legal_backward
from cudnn_flex_compile.engine.guards import ends, guarded, needs_guard
from cudnn_flex_compile.engine.plans.box_plan import assemble_boxes, divided
from cudnn_flex_compile.engine.problem import BACKWARD, Problem, output_specs
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.store.plan_cache import Plan
from cudnn_flex_compile.engine.support import refused
from cudnn_flex_compile.phases import phase
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import Expr, Program
from cudnn_flex_compile.scoremod.masks.boxes import pruned
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.switches import on
from cudnn_flex_compile.scoremod.text import parse


@dataclass(frozen=True, slots=True)
class Attempt:
    """Builds one plan when it is called, or says why cuDNN does not.

    Attributes:
        last_resort: whether it is an attempt before it, written in another way that does more work.
        variant: how its graph is written, the same at every shape; None where that depends on the lengths.
    """

    make: Callable[[], Plan | Reason]
    last_resort: bool = False
    variant: tuple[Hashable, ...] | None = None

    def __call__(self) -> Plan | Reason:
        return self.make()


def attempts(problem: Problem) -> list[Attempt]:
    """What builds a plan of a problem, in the order of trial."""
    if problem.tiled:
        return [Attempt(functools.partial(_of_tiles, problem))]
    program = pruned(parse(problem.program), problem.lengths)
    found = [Attempt(functools.partial(_in_parts, program, problem))]
    for variant in _variants(program, problem):
        written = variant.strategy.name, variant.guard, variant.expand
        found.append(Attempt(functools.partial(_build_with, variant, program, problem), variant.last_resort, written))
    return _with_others(problem, found) if problem.lse_gradient else found


def _of_tiles(problem: Problem) -> Plan | Reason:
    from cudnn_flex_compile.engine.tiles.plan import build

    engine.plans.count("builds")
    with phase("build"):
        return build(problem)


def _with_others(problem: Problem, found: list[Attempt]) -> list[Attempt]:
    """With all attempts for the problem without a gradient of the log-sum-exp whose plans give one with it."""
    from cudnn_flex_compile.engine.plans.wrappers import WRAPPERS

    way = next(way for way in WRAPPERS.values() if way.takes(problem))
    plain = way.inner_problem(problem)
    if refused(plain, parse(plain.program)) is not None:
        return found

    def make(inner: Attempt) -> Plan | Reason:
        plan = inner()
        return plan if isinstance(plan, Reason) else way(problem, plan)

    others = [
        Attempt(functools.partial(make, inner), inner.last_resort, inner.variant and (way.NAME, *inner.variant))
        for inner in attempts(plain)
    ]
    return [*others, *found] if way.FIRST else [*found, *others]


def _in_parts(program: Program, problem: Problem) -> Plan | Reason:

    found = divided(program, problem.lengths, problem.direction)
    if found is None:
        return Reason(Code.UNSUPPORTED_CALL, "one plan is as fast as several")
    return assemble_boxes(problem, program, found, output_specs(problem), _first_built)


def _first_built(program: Program, problem: Problem) -> Plan | Reason:
    """The first plan that cuDNN builds; what it is part of is certified as a whole."""
    reasons: list[Reason] = []
    for variant in _variants(program, problem):
        plan = _build_with(variant, program, problem)
        if not isinstance(plan, Reason):
            return plan
        reasons.append(plan)
    return most_telling(reasons)


@dataclass(frozen=True, slots=True)
class Variant:
    """A strategy for the program, with its ends guarded (tail.py) or not, with expanded operands or not."""

    strategy: Strategy
    guard: bool
    expand: bool
    last_resort: bool


def _variants(program: Program, problem: Problem) -> Iterator[Variant]:
    """In order: every strategy for the program as it is, guarded, and, where these give none, expanded."""
    guards = [False, True]
    if problem.direction == BACKWARD and _needs_guard(program, problem):
        guards.remove(False)
    expanded = [False, True] if problem.operands and on("every head") else [False]
    for expand, guard, strategy in itertools.product(expanded, guards, STRATEGIES):
        yield Variant(strategy, guard, expand, last_resort=expand or guard != guards[0])


def _build_with(variant: Variant, program: Program, problem: Problem) -> Plan | Reason:
    from cudnn_flex_compile.engine.plans.graph_plan import build

    program = guarded(program, problem.lengths) if variant.guard else program
    lowering: Lowering | Reason = variant.strategy.lower(program, problem.direction == BACKWARD, _inside(problem))
    if isinstance(lowering, Reason):
        return lowering
    if variant.strategy.name == DENSE and split(program.mask).unmasked:
        return Reason(Code.UNSUPPORTED_CALL, "without a mask, dense is the graph of chained")
    if variant.expand:
        if lowering.lengths is not None or not _expands(lowering, problem):
            return Reason(Code.UNSUPPORTED_CALL, "no operand expands")
        lowering = replace(lowering, expanded=True)
    engine.plans.count("builds")
    with phase("build"):
        return build(problem, lowering)


def _expands(lowering: Lowering, problem: Problem) -> bool:
    """Whether the graph with expanded operands is another one."""
    from cudnn_flex_compile.engine.graph.emit import operand_view

    operands = [n for n in ir.walk(*lowering.leaves) if n.kind == "operand"]
    return any(operand_view(n, problem) != operand_view(n, problem, expanded=True) for n in operands)


def _inside(problem: Problem) -> Expr | None:
    """Where a gradient of the log-sum-exp counts, if the problem takes one."""
    return ends(problem.lengths) if problem.lse_gradient else None


def _needs_guard(program: Program, problem: Problem) -> bool:
    score, gradient = biased(program), legal_backward(program, _inside(problem))
    if isinstance(score, Reason) or isinstance(gradient, Reason):
        return False
    return needs_guard(ir.program(score, program.mask), gradient, problem.lengths)


# What says most about why no strategy works comes first.
_TELLING = (Code.CERTIFICATION, Code.NO_BACKWARD, Code.ILLEGAL_OP, Code.SHAPE_REFUSED)


def most_telling(reasons: list[Reason]) -> Reason:
    """One for all of them; lasting if all are."""
    return replace(_most_telling_of(reasons), lasting=all(reason.lasting for reason in reasons))


def _most_telling_of(reasons: list[Reason]) -> Reason:
    for code in _TELLING:
        for reason in reasons:
            if reason.code is code:
                return reason
    return reasons[-1]
