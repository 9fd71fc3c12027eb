"""Keeps verdicts beyond the process: looks one up before anything is built, and stores what was found out.

Knows nothing of how plans are found. A verdict holds for the problem, what it was compared with (by its fingerprint),
our code, the libraries' versions, the driver and the kind of device; all of it is in the entry, and compared. What
cannot be read or restored is a miss. Reasons that may pass, such as too little memory, are not stored.

A second user's functions do not inherit the verdict on the first's, even if both became the same program by a fault of
ours: the fingerprint is of their traced graphs. Values that they captured are not in it; a plan reads those as
operands, of whatever content, and its certification has drawn many.
"""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from cudnn_flex_compile.config import Policy
from cudnn_flex_compile.engine.certify.reference import Reference
from cudnn_flex_compile.engine.plans.box_plan import BoxPlan, assemble_boxes, divided
from cudnn_flex_compile.engine.problem import Problem, output_specs
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.store.codec import Certified, StoredPlan, decode, encode
from cudnn_flex_compile.engine.store.identity import key_of, problem_text
from cudnn_flex_compile.engine.store.plan_cache import Plan
from cudnn_flex_compile.phases import phase
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.scoremod.ir import Program
from cudnn_flex_compile.scoremod.masks.boxes import pruned
from cudnn_flex_compile.scoremod.text import parse

if TYPE_CHECKING:
    from cudnn_flex_compile.engine.plans.graph_plan import GraphPlan

log = logging.getLogger("cudnn_flex_compile")


class Use(NamedTuple):
    """What a rule of certification means for verdicts that outlive the process."""

    trusted: bool
    kept: bool


USES = {"once": Use(True, True), "always": Use(False, True), "off": Use(False, False)}


def recall(problem: Problem, reference: Reference, policy: Policy) -> Plan | Reason | None:
    """The stored verdict on a problem, its plans ready to run on the current device; None if there is none.

    Args:
        reference: what plans of the problem are compared with.
        policy: whether a stored verdict is trusted, and whether the plan is wanted that was the fastest, not the first.
    """
    store, fingerprint = engine.store, reference.fingerprint
    if store is None or fingerprint is None or not USES[policy.certify].trusted:
        return None
    with phase("restore"):
        data = store.read(key_of(problem, fingerprint, policy))
        if data is None:
            return None
        try:
            verdict = decode(data)
            if isinstance(verdict, Reason):
                return verdict
            found = _restored(problem, verdict)
            if not isinstance(found, Reason):
                found.errors = verdict.errors
            return found
        except ValueError as error:
            log.info("cudnn_flex: a stored plan cannot be used and is built anew: %s", error)
            return None


def keep(problem: Problem, reference: Reference, policy: Policy, found: Plan | Reason) -> None:
    """Stores a verdict that was found out by this policy."""
    store, fingerprint = engine.store, reference.fingerprint
    passing = isinstance(found, Reason) and not found.lasting
    if store is None or fingerprint is None or passing or not USES[policy.certify].kept:
        return
    with phase("keep"):
        try:
            data = encode(found if isinstance(found, Reason) else _stored(found))
        except ValueError as error:
            log.info("cudnn_flex: a plan is not kept beyond this process: %s", error)
            return
        store.write(key_of(problem, fingerprint, policy), data)


def recall_text(key: str) -> str | None:
    """What keep_text kept under this key, in this process or in another."""
    store = engine.store
    data = None if store is None else store.read(key)
    return None if data is None else data.decode()


def keep_text(key: str, value: str) -> None:
    """Keeps what was measured; the key has all that it depends on."""
    store = engine.store
    if store is not None:
        store.write(key, value.encode())


def _stored(found: Plan) -> Certified:
    from cudnn_flex_compile.engine.plans.wrapped import WrappedPlan

    if isinstance(found, WrappedPlan):
        return replace(_stored(found.inner), around=found.NAME, errors=found.errors)
    plans: list[Any] = list(found.plans) if isinstance(found, BoxPlan) else [found]
    stored = [StoredPlan(problem_text(p.problem), p.binding, p.workspace, p.serialized()) for p in plans]
    return Certified(tuple(stored), isinstance(found, BoxPlan), errors=found.errors)


def _compiled(problem: Problem) -> Plan:
    """A plan of kernels that the frontend keeps."""
    from cudnn_flex_compile.engine.tiles.plan import build

    plan = build(problem)
    if isinstance(plan, Reason):
        raise ValueError(str(plan))
    return plan


def _restored(problem: Problem, verdict: Certified) -> Plan | Reason:
    """Raises ValueError for plans of other problems: our code cannot have changed, but be sure."""
    from cudnn_flex_compile.engine.plans.graph_plan import restore
    from cudnn_flex_compile.engine.plans.wrappers import WRAPPERS

    if problem.tiled:
        return _compiled(problem)
    if verdict.around:
        way = WRAPPERS[verdict.around]
        return way(problem, _restored(way.inner_problem(problem), replace(verdict, around="")))
    left = list(verdict.plans)

    def next_plan(_: Program, part: Problem) -> "GraphPlan":
        stored = left.pop(0)
        if stored.problem != problem_text(part):
            raise ValueError("it is for another problem")
        plan = restore(part, stored.binding, stored.data)
        if plan.workspace != stored.workspace:
            raise ValueError(f"it wants {plan.workspace} bytes of workspace, {stored.workspace} when it was stored")
        return plan

    program = parse(problem.program)
    if not verdict.in_parts:
        return next_plan(program, problem)
    program = pruned(program, problem.lengths)
    boxes = divided(program, problem.lengths, problem.direction) or []
    if len(boxes) != len(left):
        raise ValueError(f"it has {len(left)} parts, {len(boxes)} are wanted")
    return assemble_boxes(problem, program, boxes, output_specs(problem), next_plan)
