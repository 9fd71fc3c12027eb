"""Encodes verdicts as bytes: the plans that were certified, or the reason why there is none.

verdicts.py stores these bytes. They are JSON, which keeps floats exactly, and the plans' own bytes.
"""

import json
import struct
from dataclasses import dataclass
from typing import Any

from cudnn_flex_compile.engine.plans.plan import Record
from cudnn_flex_compile.engine.problem import Error
from cudnn_flex_compile.reasons import Code, Reason

LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Certified:
    """A plan that passed certification. errors: the errors that it measured."""

    plan: Record
    errors: tuple[Error, ...] = ()


Verdict = Certified | Reason


def encode(verdict: Verdict) -> bytes:
    """The bytes that `decode` reads."""
    if isinstance(verdict, Reason):
        return _joined({"reason": [verdict.code.name, verdict.detail]}, b"")
    data: list[bytes] = []
    plan = _tree(verdict.plan, data)
    return _joined({"plan": plan, "errors": verdict.errors}, b"".join(data))


def _tree(record: Record, data: list[bytes]) -> dict[str, Any]:
    """A record as JSON takes it; its bytes, and those of its parts, go into a list, in order."""
    data.append(record.data)
    own = {"kind": record.kind, "problem": record.problem, "details": record.details, "bytes": len(record.data)}
    return {**own, "parts": [_tree(part, data) for part in record.parts]}


def decode(data: bytes) -> Verdict:
    """The verdict that `encode` got. Raises ValueError for other bytes."""
    try:
        (size,) = LENGTH.unpack_from(data)
        head, rest = json.loads(data[LENGTH.size : LENGTH.size + size]), data[LENGTH.size + size :]
        if "reason" in head:
            name, detail = head["reason"]
            return Reason(Code[name], str(detail))
        plan, rest = _record(head["plan"], rest)
        if rest:
            raise ValueError("plans and their bytes do not fit")
        return Certified(plan, tuple(Error(str(name), float(a), float(b)) for name, a, b in head["errors"]))
    except (KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"not a verdict: {type(error).__name__}: {error}") from error


def _record(tree: dict[str, Any], rest: bytes) -> tuple[Record, bytes]:
    """The record, and the rest of the bytes after its own and those of its parts."""
    data, rest = rest[: tree["bytes"]], rest[tree["bytes"] :]
    if len(data) != tree["bytes"]:
        raise ValueError("a plan is cut off")
    parts: list[Record] = []
    for given in tree["parts"]:
        part, rest = _record(given, rest)
        parts.append(part)
    return Record(str(tree["kind"]), str(tree["problem"]), dict(tree["details"]), data, tuple(parts)), rest


def _joined(head: dict[str, Any], rest: bytes) -> bytes:
    text = json.dumps(head).encode()
    return LENGTH.pack(len(text)) + text + rest
