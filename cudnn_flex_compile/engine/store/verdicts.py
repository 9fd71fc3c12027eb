"""Keeps verdicts beyond the process: looks one up before anything is built, and stores new ones.

find_plan.py calls it. A verdict holds for the problem, the functions that its plan was compared with (by their
fingerprint), our code, the libraries' versions, the driver and the kind of device; all of it is in the entry, and
compared. An entry that cannot be read or restored is a miss. Reasons that may pass, such as too little memory, are not
stored.

Two functions do not share a verdict, even if a fault of our tracing made the same program of both: the fingerprint is
that of their traced graphs. Captured values are not in it: a plan reads these as operands, whose contents may be
anything, and its certification has drawn many.
"""

import logging
from typing import NamedTuple

from cudnn_flex_compile.config import Policy
from cudnn_flex_compile.engine.certify.reference import Reference
from cudnn_flex_compile.engine.plans.kinds import restore
from cudnn_flex_compile.engine.plans.plan import Plan
from cudnn_flex_compile.engine.problem import Problem
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.store.codec import Certified, decode, encode
from cudnn_flex_compile.engine.store.identity import key_of
from cudnn_flex_compile.phases import phase
from cudnn_flex_compile.reasons import Reason

log = logging.getLogger("cudnn_flex_compile")


class Use(NamedTuple):
    """The use that a rule of certification makes of verdicts that outlive the process."""

    trusted: bool
    kept: bool


USES = {"once": Use(True, True), "always": Use(False, True), "off": Use(False, False)}


def recall(problem: Problem, reference: Reference, policy: Policy) -> Plan | Reason | None:
    """The stored verdict on a problem, its plans ready to run on the current device; None if there is none.

    Args:
        reference: computes the scores with which plans of the problem are compared.
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
            found = restore(problem, verdict.plan)
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
            data = encode(found if isinstance(found, Reason) else Certified(found.to_record(), found.errors))
        except ValueError as error:
            log.info("cudnn_flex: a plan is not kept beyond this process: %s", error)
            return
        store.write(key_of(problem, fingerprint, policy), data)
