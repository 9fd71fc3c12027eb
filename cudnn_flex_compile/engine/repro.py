"""Tells the user of plans that certification rejected, by one warning and a script that builds the plan again.

choose.py calls it. A rejected plan that another variant of the same strategy replaces (guarded, expanded) costs the
user nothing, and is logged at level INFO.
"""

import functools
import hashlib
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from cudnn_flex_compile.engine.certify.reference import ProgramReference, Reference
from cudnn_flex_compile.engine.problem import BACKWARD, Problem
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.scoremod.text import text

log = logging.getLogger("cudnn_flex_compile")
_warned: set[tuple[str, str, tuple[int, ...]]] = set()

SCRIPT = '''"""A plan that cudnn_flex_compile rejected: its numbers were wrong.

{verdict}
call: {source}
{versions}

Builds the plan again and checks it against its program. Exits 1 while it is wrong, 0 if it is right or is not built.
(The check that rejected it used the call's own score_mod and mask_mod, and those of its integers that were known.)
"""

import sys

import torch  # noqa: F401  (the layouts below name its dtypes)

from cudnn_flex_compile.engine.problem import Problem, TensorSpec
from cudnn_flex_compile.engine.repro import rerun
from cudnn_flex_compile.scoremod.text import parse

PROBLEM = {problem}

sys.exit(rerun(PROBLEM, attempt={attempt}))
'''


@dataclass(frozen=True, slots=True)
class Rejection:
    """attempt: its number among candidates.attempts. strategy: the plan's. verdict: certification's reason."""

    attempt: int
    strategy: str
    verdict: Reason


def warned(program: str) -> bool:
    """Whether the user has been told that certification rejected a plan of this program."""
    return any(warned_of == program for warned_of, _, _ in _warned)


def warn_of(
    rejected: Sequence[Rejection], problem: Problem, reference: Reference, used: str | None
) -> None:  # fmt: skip
    """Warns once for each program, direction and shape, if the call is kept (`used` is None) or runs on another
    strategy. The warning is about the first rejected plan, which was wanted most.
    """
    if not rejected:
        return
    first, key = rejected[0], (text(problem.program), problem.direction, (*problem.query.shape, *problem.key.shape))
    if used == first.strategy or key in _warned:
        log.info("cudnn_flex: certification rejected a plan, which is not used: %s", first.verdict.detail)
        return
    _warned.add(key)
    source = getattr(reference, "source", "") or "a flex_attention call"
    log.warning(
        "cudnn_flex: certification rejected cuDNN's plan for %s: %s. %s. %s.",
        source, first.verdict.detail,
        f"It runs as {used} instead" if used else "It is kept on stock flex_attention",
        _write(first, problem, source),
    )  # fmt: skip


@functools.cache
def folder() -> Path:
    """The folder of this process's scripts. Raises OSError."""
    return Path(tempfile.mkdtemp(prefix="cudnn_flex_repro_"))


def script(rejection: Rejection, problem: Problem, source: str) -> str:
    return SCRIPT.format(
        verdict=str(rejection.verdict).replace('"""', "'''").replace("\\", "/"),
        source=source.replace('"""', "'''").replace("\\", "/"),
        versions=_versions(),
        problem=_source(problem),
        attempt=rejection.attempt,
    )


def _source(problem: Problem) -> str:
    """The expression that makes the problem, in a script that imports what it names."""
    values = {f.name: repr(getattr(problem, f.name)) for f in fields(problem)}
    values["program"] = f"parse({text(problem.program)!r})"
    return f"Problem({', '.join(f'{name}={value}' for name, value in values.items())})"


def _versions() -> str:
    from cudnn_flex_compile.engine.versions import cudnn_missing, versions

    if cudnn_missing() is not None:
        return "versions: unknown"
    return "torch {}, cudnn frontend {}, cuDNN {}".format(*versions())


def _write(rejection: Rejection, problem: Problem, source: str) -> str:
    """Writes the script, and says where it is, or why there is none: a full or read-only disk must not stop a model."""
    source_code = script(rejection, problem, source)
    try:
        path = folder() / f"{hashlib.sha256(source_code.encode()).hexdigest()[:12]}.py"
        path.write_text(source_code)
    except OSError as error:
        return f"No script to reproduce it could be written: {error}"
    return f"To reproduce: python {path}"


def rerun(problem: Problem, attempt: int) -> int:
    """Builds an attempt of a problem and certifies it, for a script: 1 if it is wrong, else 0."""
    from cudnn_flex_compile.engine.worker import run_clean

    wrong = run_clean(lambda: _wrong(problem, attempt), problem.device)
    print(wrong or "right")
    return 0 if wrong is None or not wrong.startswith("wrong") else 1


def _wrong(problem: Problem, attempt: int) -> str | None:
    from cudnn_flex_compile.engine.candidates import attempts
    from cudnn_flex_compile.engine.certify.certify import certify

    reference = ProgramReference(problem.program)
    plan = attempts(problem)[attempt]()
    if isinstance(plan, Reason):
        return f"not built: {plan}"
    forwards = (make() for make in attempts(problem.forward())) if problem.direction == BACKWARD else (plan,)
    for forward in forwards:
        if isinstance(forward, Reason) or (forward is not plan and certify(forward, forward, reference)):
            continue
        verdict = certify(plan, forward, reference)
        return None if verdict is None else f"wrong: {verdict}"
    return "not built: there is no forward whose results this backward needs"
