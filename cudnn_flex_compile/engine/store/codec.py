"""Encodes verdicts as bytes: the plans that were certified, or the reason why there is none.

verdicts.py stores these bytes. They are JSON, which keeps floats exactly, and the plans' own bytes.
"""

import json
import struct
from dataclasses import asdict, dataclass
from typing import Any

from cudnn_flex_compile.engine.problem import Binding, Error
from cudnn_flex_compile.reasons import Code, Reason

LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class StoredPlan:
    """One plan.

    Attributes:
        problem: the text of its problem, which is the verdict's or a part of that.
        workspace: bytes that each run needs.
        data: the serialised graph.
    """

    problem: str
    binding: Binding
    workspace: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Certified:
    """Plans that passed together: one, or with `in_parts` one for each box of the problem, in order; `around` names
    the plan that runs them (engine/plans/wrapped.py), if one does. errors: what certification measured.
    """

    plans: tuple[StoredPlan, ...]
    in_parts: bool = False
    around: str = ""
    errors: tuple[Error, ...] = ()


Verdict = Certified | Reason


def encode(verdict: Verdict) -> bytes:
    """The bytes that `decode` reads."""
    if isinstance(verdict, Reason):
        return _joined({"reason": [verdict.code.name, verdict.detail]}, b"")
    plans = [
        {"problem": p.problem, "binding": asdict(p.binding), "workspace": p.workspace, "bytes": len(p.data)}
        for p in verdict.plans
    ]
    head = {"in_parts": verdict.in_parts, "around": verdict.around, "plans": plans, "errors": verdict.errors}
    return _joined(head, b"".join(p.data for p in verdict.plans))


def decode(data: bytes) -> Verdict:
    """The verdict that `encode` got. Raises ValueError for other bytes."""
    try:
        (size,) = LENGTH.unpack_from(data)
        head, rest = json.loads(data[LENGTH.size : LENGTH.size + size]), data[LENGTH.size + size :]
        if "reason" in head:
            name, detail = head["reason"]
            return Reason(Code[name], str(detail))
        return _certified(head, rest)
    except (KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"not a verdict: {type(error).__name__}: {error}") from error


def _certified(head: dict[str, Any], rest: bytes) -> Certified:
    plans: list[StoredPlan] = []
    for plan in head["plans"]:
        data, rest = rest[: plan["bytes"]], rest[plan["bytes"] :]
        if len(data) != plan["bytes"]:
            raise ValueError("a plan is cut off")
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plan["binding"].items()}
        binding = Binding(**given)
        plans.append(StoredPlan(str(plan["problem"]), binding, int(plan["workspace"]), data))
    if rest or not plans or (len(plans) > 1 and not head["in_parts"]):
        raise ValueError("plans and their bytes do not fit")
    errors = tuple(Error(str(name), float(found), float(stock)) for name, found, stock in head["errors"])
    return Certified(tuple(plans), bool(head["in_parts"]), str(head["around"]), errors)


def _joined(head: dict[str, Any], rest: bytes) -> bytes:
    text = json.dumps(head).encode()
    return LENGTH.pack(len(text)) + text + rest
