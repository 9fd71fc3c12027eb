"""Chooses the plan of a problem among its attempts: the first that is certified, or the fastest of all certified ones.

find_plan.py calls it when no plan is known; candidates.py lists the attempts, and engine/certify checks them.
"""

import functools
import time
from collections.abc import Callable, Hashable, Sequence

import torch

from cudnn_flex_compile.config import Policy
from cudnn_flex_compile.engine.candidates import attempts
from cudnn_flex_compile.engine.certify.coverage import class_of
from cudnn_flex_compile.engine.certify.reference import ProgramReference, Reference
from cudnn_flex_compile.engine.certify.regimes import REGIMES, drawn
from cudnn_flex_compile.engine.certify.samples import SEED
from cudnn_flex_compile.engine.launch import timing
from cudnn_flex_compile.engine.plans.plan import Plan
from cudnn_flex_compile.engine.problem import BACKWARD, Problem
from cudnn_flex_compile.engine.repro import Rejection, warn_of
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.phases import phase
from cudnn_flex_compile.reasons import Reason, most_telling

OF_SHAPES = tuple(regime for regime in REGIMES if regime.shapes)


def choose(problem: Problem, forward: Plan | None, reference: Reference, policy: Policy) -> Plan | Reason:
    """The plan that is kept, or the most telling reason why there is none.

    Args:
        forward: a certified forward of the call, for a backward.
        policy: whether plans are checked, and whether all attempts are timed and the fastest is kept.
    """
    reasons: list[Reason] = []
    rejected: list[Rejection] = []
    right: list[Plan] = []
    for number, attempt in enumerate(attempts(problem)):
        if right and attempt.last_resort:
            continue
        if policy.strategy not in ("", *(attempt.variant or ("parts",))):
            continue
        plan = attempt()
        if isinstance(plan, Reason):
            reasons.append(plan)
            continue
        verdict = certified(plan, forward or plan, reference, policy, attempt.variant)
        if verdict is None:
            right.append(plan)
        elif not right:
            reasons.append(verdict)
            rejected.append(Rejection(number, plan.strategy, verdict))
        if right and not policy.autotune:
            break
    chosen = _fastest(right, forward, reference) if right else None
    warn_of(rejected, problem, reference, chosen and chosen.strategy)
    return chosen or most_telling(reasons, policy.strategy)


def certified(
    plan: Plan, forward: Plan, reference: Reference, policy: Policy, variant: tuple[Hashable, ...] | None = None
) -> Reason | None:
    """Certifies a plan: the reason against it, or None.

    Args:
        variant: the attempt's. Where there is one, and plans of its class were certified in full (coverage.py), the
            plan is checked on fewer regimes.
    """
    from cudnn_flex_compile.engine.certify.certify import certify

    if policy.certify == "off":
        return None
    kind = variant and class_of(plan.problem, variant, reference.fingerprint)
    known = policy.certify == "once" and kind is not None and bool(engine.coverage.get(kind))
    engine.plans.count("certifications")
    start = time.perf_counter()
    with phase("certify"):
        verdict = certify(plan, forward, reference, OF_SHAPES if known else REGIMES)
        verdict = verdict or _wrong_on_harder_mask(plan, forward)
    engine.plans.count("certify_seconds", time.perf_counter() - start)
    if verdict is not None:
        engine.plans.count("rejections")
    elif kind is not None and not known:
        engine.coverage.put(kind, True)
    return verdict


def _wrong_on_harder_mask(plan: Plan, forward: Plan) -> Reason | None:
    from cudnn_flex_compile.engine.certify.certify import certify

    harder = plan.on_harder_mask()
    before = harder if forward is plan else forward.on_harder_mask()
    if harder is None or before is None:
        return None
    return certify(harder, before, ProgramReference(harder.problem.program), OF_SHAPES)


def _fastest(right: Sequence[Plan], forward: Plan | None, reference: Reference) -> Plan:
    if len(right) == 1:
        return right[0]
    with phase("autotune"):
        times = timing.milliseconds([run_of(plan, forward or plan, reference) for plan in right])
    return right[times.index(min(times))]


# The operands, integers and floats of a call.
Values = tuple[Sequence[torch.Tensor], Sequence[int], Sequence[torch.Tensor]]


def run_of(plan: Plan, forward: Plan, reference: Reference, values: Values | None = None) -> Callable[[], None]:
    """A function that runs a plan on made-up queries, keys and values of its problem, and on values of its program that
    are given, or made up, too. The plans are prepared for these values.
    """
    problem = plan.problem
    generator = torch.Generator(plan.device).manual_seed(SEED)
    t = drawn(problem, generator)
    if values is None:
        sample = reference.sample(problem, generator)
        values = (sample.operands, sample.ints, sample.floats)
    rest, plan = values, plan.prepared(*values) or plan
    inputs = (t.query, t.key, t.value)
    wanted = (t.out, t.stats) if forward.problem.stats else (t.out,)
    if problem.direction != BACKWARD:
        return functools.partial(plan.run, (*inputs, *wanted), *rest)
    (forward.prepared(*values) or forward).run((*inputs, *wanted), *rest)
    gradients = [spec.empty(plan.device) for spec in plan.outputs]
    rows = [t.grad_lse] if problem.lse_gradient else []
    return functools.partial(plan.run, (*inputs, t.out, t.stats, t.grad, *rows, *gradients), *rest)
