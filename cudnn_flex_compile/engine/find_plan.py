"""Finds the plan of a call: in this process, in the cache folder, or by choosing one now; and remembers it.

The pass asks it while compiling, and kernels/cuda.py at run time for a shape that has no plan yet. choose.py chooses;
nothing here depends on FX graphs or on the ops.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from cudnn_flex_compile.config import Policy
from cudnn_flex_compile.engine.certify.reference import ProgramReference, Reference
from cudnn_flex_compile.engine.choose import certified, choose
from cudnn_flex_compile.engine.key import Call, Key, by_list, forward_of, given_layouts, policy_of, problem_of
from cudnn_flex_compile.engine.plans.plan import Plan
from cudnn_flex_compile.engine.problem import BACKWARD, Problem
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.store.lru import CacheInfo
from cudnn_flex_compile.engine.store.plan_cache import CachedPlan
from cudnn_flex_compile.engine.store.verdicts import keep, recall
from cudnn_flex_compile.engine.support import refused
from cudnn_flex_compile.engine.versions import unusable_device
from cudnn_flex_compile.engine.worker import run_clean
from cudnn_flex_compile.phases import count
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod.ir import Program

log = logging.getLogger("cudnn_flex_compile")


def cache_info() -> CacheInfo:
    """Counters of the plan cache, since the process started or the cache was cleared."""
    return engine.plans.info()


def cache_clear() -> None:
    """Drops all plans and lists of tiles but those that a CUDA graph captured, and zeroes the counters. The cache
    folder keeps its verdicts.
    """
    engine.clear()


def remember_reference(problem: Problem, reference: Reference) -> None:
    """Keeps the user's own functions, for certifying plans of this program at this shape."""
    engine.references.put(_reference_key(problem), reference)


def _reference_key(problem: Problem) -> tuple[Program, tuple[int, ...]]:
    return problem.program, (*problem.query.shape[:3], problem.key.shape[2])


def _reference(problem: Problem) -> Reference:
    return engine.references.get(_reference_key(problem)) or ProgramReference(problem.program)


def find_plan(
    call: Key, reference: Callable[[], Reference] | None = None, fingerprint: str | None = None
) -> CachedPlan | Reason:
    """The certified plan of a call, from the cache or built now, or the reason why there is none.

    Args:
        reference: gives the user's own functions, where they are at hand. A plan that was compared with other functions
            is compared with these, too, although they became the same program, so that a fault of our tracing shows.
        fingerprint: the reference's.

    Raises:
        RuntimeError: a plan must be built while a CUDA graph is being captured.
    """
    found = engine.plans.get(call)
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
    functions = reference()  # in this thread, because they read its autograd state
    return run_clean(lambda: _or_why_not(lambda: _compared(call, found, functions)), Call(*call).device)


def _compared(call: Key, found: CachedPlan, reference: Reference) -> CachedPlan | Reason:
    """The plan, if it is right for these functions as well, else the reason against it."""
    before = _forward(call) if Call(*call).direction == BACKWARD else found
    if isinstance(before, Reason):
        return before
    verdict = certified(found.plan, before.plan, reference, policy_of(call))
    if verdict is not None:
        return verdict
    found.references.add(reference.fingerprint)
    return found


def _forward(call: Key) -> CachedPlan | Reason:
    """Gives a forward of a backward call, also where the cache has dropped it. By a list or not, its outputs are the
    same: where each direction runs in its own way, the one that is there does.
    """
    key = forward_of(call)
    found, other = engine.plans.peek(key), engine.plans.peek(by_list(key, int(not Call(*key).tiled)))
    if isinstance(other, CachedPlan) and not isinstance(found, CachedPlan):
        return other
    return found or engine.plans.put(key, _make(key))


def _build(call: Key) -> CachedPlan | Reason:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "cudnn_flex_compile: this attention call has no plan yet, and none can be built while a CUDA graph is "
            "being captured. Run the model once with these shapes before capturing."
        )
    with engine.building:
        found = engine.plans.peek(call)
        if found is None:
            found = engine.plans.put(call, run_clean(lambda: _make(call), Call(*call).device))
        return found


def _make(call: Key) -> CachedPlan | Reason:
    problem = problem_of(call)
    reason = unusable_device(problem.device) or refused(problem, problem.program)
    if reason is not None:
        return reason
    forward = None
    if problem.direction == BACKWARD:
        ready = _forward(call)
        if isinstance(ready, Reason):
            return ready
        forward = ready.plan
    reference, policy = _reference(problem), policy_of(call)
    plan = _or_why_not(lambda: _stored_or_chosen(problem, forward, reference, policy))
    return plan if isinstance(plan, Reason) else CachedPlan(plan, _copies(call, problem), {reference.fingerprint})


Found = TypeVar("Found")


def _or_why_not(find: Callable[[], Found]) -> Found | Reason:
    """The result of `find`, or a reason that says that memory is short, or which error came up."""
    try:
        return find()
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        detail = f"not enough memory to build or certify a plan: {str(error)[:120]}"
        return Reason(Code.MEMORY, detail, lasting=False)
    except Exception as error:  # a bug of ours, or a function that cannot be evaluated here, must not stop the model
        log.warning("cudnn_flex: building or certifying a plan failed", exc_info=True)
        return Reason(Code.INTERNAL, f"{type(error).__name__}: {error}", lasting=False)


def _stored_or_chosen(
    problem: Problem, forward: Plan | None, reference: Reference, policy: Policy
) -> Plan | Reason:  # fmt: skip
    found = recall(problem, reference, policy)
    if found is not None:
        engine.plans.count("restored")
        return found
    found = choose(problem, forward, reference, policy)
    keep(problem, reference, policy, found)
    return found


def _copies(call: Key, problem: Problem) -> tuple[bool, bool, bool, bool]:
    given, wanted = Call(*call), (problem.query, problem.key, problem.value)
    q, k, v = (spec != w for spec, w in zip(given_layouts(given), wanted, strict=True))
    return q, k, v, problem.grad is not None and tuple(given.grad_stride) != problem.grad.stride
