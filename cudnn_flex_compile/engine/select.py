"""Finds the plan of a problem: tries the strategies in order, builds, certifies, remembers.

Knows nothing of FX graphs or of the op that runs plans.
"""

import atexit
import functools
import itertools
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import torch

from cudnn_flex_compile.engine.cache import Cache, CacheInfo
from cudnn_flex_compile.engine.call import Key, forward_of, problem_of
from cudnn_flex_compile.engine.clean import run_clean
from cudnn_flex_compile.engine.lowering import Lowering
from cudnn_flex_compile.engine.memory import Layout
from cudnn_flex_compile.engine.parts import PartsPlan, assemble_parts, divided
from cudnn_flex_compile.engine.problem import BACKWARD, Problem, TensorSpec, dense
from cudnn_flex_compile.engine.reference import ProgramReference, Reference
from cudnn_flex_compile.engine.repro import Rejection, warn_of
from cudnn_flex_compile.engine.strategies import STRATEGIES, Strategy
from cudnn_flex_compile.engine.strategies.dense import NAME as DENSE
from cudnn_flex_compile.engine.strategies.scores import biased, legal_backward
from cudnn_flex_compile.engine.support import refused
from cudnn_flex_compile.engine.tail import ends, guarded, needs_guard
from cudnn_flex_compile.engine.verdicts import keep, recall
from cudnn_flex_compile.engine.versions import cudnn_version, unusable_device
from cudnn_flex_compile.locks import new_lock
from cudnn_flex_compile.phases import count, phase
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import TRUE, Expr, Program
from cudnn_flex_compile.scoremod.masks.boxes import pruned
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.switches import on
from cudnn_flex_compile.scoremod.text import parse

if TYPE_CHECKING:
    from cudnn_flex_compile.engine.plan import Plan
    from cudnn_flex_compile.engine.tile_plan import TilePlan
    from cudnn_flex_compile.engine.wide import WidePlan

    Runs = Plan | PartsPlan | WidePlan | TilePlan


@dataclass(slots=True)
class Policy:
    """What options say about plans."""

    certify: str = "once"


@dataclass(frozen=True)
class Ready:
    """A certified plan.

    Attributes:
        copies: which of query, key, value and the output's gradient must be copied for it.
        references: fingerprints of what it was compared with.
    """

    plan: "Runs"
    copies: tuple[bool, bool, bool, bool]
    references: set[str | None] = field(default_factory=set[str | None], compare=False)

    @functools.cached_property
    def copied(self) -> bool:
        return any(self.copies)

    @functools.cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """Of what a call allocates: out and stats [B, H, Sq] (empty if the plan writes none), or dq, dk and dv."""
        problem = self.plan.problem
        if problem.direction == BACKWARD:
            return tuple(spec.layout for spec in self.plan.outputs)
        stats = dense(TensorSpec(problem.lse_shape if problem.stats else (0,), (), torch.float32))
        return self.plan.outputs[0].layout, stats.layout


log = logging.getLogger("cudnn_flex_compile")
_policy = Policy()
plans: Cache[Ready | Reason] = Cache(256)
_building = new_lock()
_references: OrderedDict[tuple[str, tuple[int, ...]], Reference] = OrderedDict()
REFERENCES = 256


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=plans.forsake)  # a child has no part in its parent's CUDA context
atexit.register(plans.clear)  # while CUDA and cuDNN are there: what modules hold may be freed after they are gone


def set_certify(mode: str) -> None:
    """Whether plans are checked ("once", "always" or "off"), from now on and in the whole process; plans made under
    another rule go.
    """
    if mode != _policy.certify:
        with _building:  # no plan of the old rule is stored after this
            _policy.certify = mode
            plans.clear()


def cache_info() -> CacheInfo:
    """Counters of the plan cache, since the process started or the cache was cleared."""
    return plans.info()


def cache_clear() -> None:
    """Drops all plans and zeroes the counters; what is kept in the cache folder stays there."""
    plans.clear()


def remember_reference(problem: Problem, reference: Reference) -> None:
    """The user's own functions, for certifying plans of this program at this shape."""
    _references[_reference_key(problem)] = reference
    while len(_references) > REFERENCES:
        _references.popitem(last=False)


def _reference_key(problem: Problem) -> tuple[str, tuple[int, ...]]:
    return problem.program, (*problem.query.shape[:3], problem.key.shape[2])


def _reference(problem: Problem) -> Reference:
    return _references.get(_reference_key(problem)) or ProgramReference(parse(problem.program))


def find_plan(
    call: Key, reference: Callable[[], Reference] | None = None, fingerprint: str | None = None
) -> Ready | Reason:
    """The certified plan of a call, from the cache or built now; or why there is none.

    Args:
        reference: gives the user's own functions, where they are at hand. A plan that was compared with others is
            compared with these, too, though they became the same program: a fault of ours would show.
        fingerprint: of the reference.

    Raises:
        RuntimeError: a plan must be built while a CUDA graph is being captured.
    """
    found = plans.get(call)
    if found is None:
        if reference is not None:
            remember_reference(problem_of(call), reference())
        return _build(call)
    count("plans found")
    if reference is None or isinstance(found, Reason) or fingerprint in found.references:
        return found
    if torch.cuda.is_current_stream_capturing():
        detail = "the plan cannot be compared with these functions while a CUDA graph is being captured"
        return Reason(Code.CERTIFICATION, detail, lasting=False)
    return run_clean(lambda: _or_why_not(lambda: _compared(call, found, reference())), call[11])


def _compared(call: Key, found: Ready, reference: Reference) -> Ready | Reason:
    """The plan, if it is right for these functions as well."""
    from cudnn_flex_compile.engine.verify import certify

    before = plans.peek(forward_of(call)) if call[0] == BACKWARD else found
    if isinstance(before, Ready):
        verdict = _certified(lambda: certify(found.plan, before.plan, reference))
        if verdict is not None:
            return verdict
        found.references.add(reference.fingerprint)
    return found


def _build(call: Key) -> Ready | Reason:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "cudnn_flex_compile: this attention call has no plan yet, and none can be built while a CUDA graph is "
            "being captured. Run the model once with these shapes before capturing."
        )
    with _building:
        found = plans.peek(call)
        return found if found is not None else plans.put(call, run_clean(lambda: _make(call), call[11]))


def _make(call: Key) -> Ready | Reason:
    problem = problem_of(call)
    program = parse(problem.program)
    reason = unusable_device(problem.device) or refused(problem, program, cudnn_version())
    if reason is not None:
        return reason
    forward = None
    if problem.direction == BACKWARD:
        before = forward_of(call)
        ready = plans.peek(before) or plans.put(before, _make(before))
        if isinstance(ready, Reason):
            return ready
        forward = ready.plan
    reference = _reference(problem)
    plan = _or_why_not(lambda: _stored_or_first_right(problem, forward, reference))
    return plan if isinstance(plan, Reason) else Ready(plan, _copies(call, problem), {reference.fingerprint})


Found = TypeVar("Found")


def _or_why_not(find: Callable[[], Found]) -> Found | Reason:
    """What `find` gives, or that memory is short, or what went wrong."""
    try:
        return find()
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        detail = f"not enough memory to build or certify a plan: {str(error)[:120]}"
        return Reason(Code.MEMORY, detail, lasting=False)
    except Exception as error:  # a bug of ours, or a function that cannot be evaluated here, must not stop the model
        log.warning("cudnn_flex: building or certifying a plan failed", exc_info=True)
        return Reason(Code.INTERNAL, f"{type(error).__name__}: {error}", lasting=False)


def _stored_or_first_right(problem: Problem, forward: "Runs | None", reference: Reference) -> "Runs | Reason":
    found = recall(problem, reference, _policy.certify)
    if found is not None:
        plans.count("restored")
        return found
    found = _first_right(problem, forward)
    keep(problem, reference, _policy.certify, found)
    return found


def _copies(call: Key, problem: Problem) -> tuple[bool, bool, bool, bool]:
    given = (call[3], call[6], call[9])
    wanted = (problem.query, problem.key, problem.value)
    q, k, v = (tuple(g) != w.stride for g, w in zip(given, wanted, strict=True))
    return q, k, v, problem.grad is not None and tuple(call[17]) != problem.grad.stride


def _first_right(problem: Problem, forward: "Runs | None") -> "Runs | Reason":
    """The first plan that cuDNN builds and certification passes: parts where they are faster, then each strategy."""
    from cudnn_flex_compile.engine.verify import certify

    reference = _reference(problem)
    reasons: list[Reason] = []
    rejected: list[Rejection] = []
    for number, make in enumerate(attempts(problem)):
        plan = make()
        if isinstance(plan, Reason):
            reasons.append(plan)
            continue
        verdict = _certified(lambda plan=plan: certify(plan, forward or plan, reference))
        if verdict is None:
            warn_of(rejected, problem, reference, plan.strategy)
            return plan
        reasons.append(verdict)
        rejected.append(Rejection(number, plan.strategy, verdict))
    warn_of(rejected, problem, reference, None)
    return _most_telling(reasons)


def attempts(problem: Problem) -> "list[Callable[[], Runs | Reason]]":
    """What builds a plan of a problem, in the order of trial."""
    if problem.tiled:
        return [functools.partial(_of_tiles, problem)]
    program = pruned(parse(problem.program), problem.lengths)
    found = [functools.partial(make, program, problem) for make in (_in_parts, *_strategies(program, problem))]
    return [*found, *_with_wider_values(problem)] if problem.lse_gradient else [*found]


def _of_tiles(problem: Problem) -> "Runs | Reason":
    from cudnn_flex_compile.engine.tile_plan import build

    plans.count("builds")
    with phase("build"):
        return build(problem)


def _with_wider_values(problem: Problem) -> "Iterator[Callable[[], Runs | Reason]]":
    """All of it for the problem without a gradient of the log-sum-exp whose plans give one with it."""
    from cudnn_flex_compile.engine.wide import WidePlan, widened

    def make(inner: "Callable[[], Runs | Reason]") -> "Runs | Reason":
        plan = inner()
        return plan if isinstance(plan, Reason) else WidePlan(problem, plan)

    wide = widened(problem)
    if refused(wide, parse(wide.program), cudnn_version()) is None:
        yield from (functools.partial(make, inner) for inner in attempts(wide))


def _in_parts(program: Program, problem: Problem) -> "Runs | Reason":
    from cudnn_flex_compile.engine.attention_graph import output_specs

    found = divided(program, problem.lengths, problem.direction)
    if found is None:
        return Reason(Code.UNSUPPORTED_CALL, "one plan is as fast as several")
    return assemble_parts(problem, program, found, output_specs(problem), _first_built)


def _first_built(program: Program, problem: Problem) -> "Runs | Reason":
    """The first plan that cuDNN builds; what it is part of is certified as a whole."""
    reasons: list[Reason] = []
    for make in _strategies(program, problem):
        plan = make(program, problem)
        if not isinstance(plan, Reason):
            return plan
        reasons.append(plan)
    return _most_telling(reasons)


def _strategies(program: Program, problem: Problem) -> "Iterator[Callable[[Program, Problem], Runs | Reason]]":
    """What builds a plan, in order: every strategy for the program, with its ends guarded (tail.py), and, where these
    give none, with expanded operands.
    """
    guards = [False, True]
    if problem.direction == BACKWARD and _needs_guard(program, problem):
        guards.remove(False)
    expanded = [False, True] if problem.operands and on("every head") else [False]
    for expand, guard, strategy in itertools.product(expanded, guards, STRATEGIES):
        yield functools.partial(_build_with, strategy, guard, expand)


def _build_with(
    strategy: Strategy, guard: bool, expand: bool, program: Program, problem: Problem
) -> "Runs | Reason":  # fmt: skip
    from cudnn_flex_compile.engine.plan import build

    variant = guarded(program, problem.lengths) if guard else program
    lowering = strategy.lower(variant, problem.direction == BACKWARD, _inside(problem))
    if isinstance(lowering, Reason):
        return lowering
    if strategy.name == DENSE and _unmasked(variant):
        return Reason(Code.UNSUPPORTED_CALL, "without a mask, dense is the graph of chained")
    if expand:
        if lowering.lengths is not None or not _expands(lowering, problem):
            return Reason(Code.UNSUPPORTED_CALL, "no operand expands")
        lowering = replace(lowering, expanded=True)
    plans.count("builds")
    with phase("build"):
        return build(problem, lowering)


def _unmasked(program: Program) -> bool:
    form = split(program.mask)
    return not form.bounds and form.residual is TRUE


def _expands(lowering: Lowering, problem: Problem) -> bool:
    """Whether the graph with expanded operands is another one."""
    from cudnn_flex_compile.engine.lower import operand_view

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


def _certified(certify: "Callable[[], Reason | None]") -> Reason | None:
    if _policy.certify == "off":
        return None
    plans.count("certifications")
    start = time.perf_counter()
    with phase("certify"):
        verdict = certify()
    plans.count("certify_seconds", time.perf_counter() - start)
    if verdict is not None:
        plans.count("rejections")
    return verdict


# What says most about why no strategy works comes first.
_TELLING = (Code.CERTIFICATION, Code.NO_BACKWARD, Code.ILLEGAL_OP, Code.SHAPE_REFUSED)


def _most_telling(reasons: list[Reason]) -> Reason:
    """One for all of them; lasting if all are."""
    return replace(_most_telling_of(reasons), lasting=all(reason.lasting for reason in reasons))


def _most_telling_of(reasons: list[Reason]) -> Reason:
    for code in _TELLING:
        for reason in reasons:
            if reason.code is code:
                return reason
    return reasons[-1]
