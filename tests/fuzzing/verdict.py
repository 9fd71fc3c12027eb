"""What became of one call.

Knows nothing of how calls are judged.
"""

from dataclasses import dataclass

RIGHT, KEPT, WRONG, ERROR, DIED, SKIPPED = "right", "kept", "wrong", "error", "died", "skipped"
FAILURES = (WRONG, ERROR, DIED)


@dataclass(frozen=True)
class Verdict:
    """One of the kinds above.

    Attributes:
        kind: right and wrong are lowered calls; error is an exception, or a bug that the pass reports; died is the end
            of the process (an illegal memory access, or no answer in time); skipped is no call at all, or no memory.
        detail: what is wrong, or why.
        reason: by what name kept calls are counted.
        strategies: of forward and backward.
        fatal: whether the process can judge no further calls.
    """

    kind: str
    detail: str = ""
    reason: str = ""
    strategies: tuple[str, ...] = ()
    fatal: bool = False

    @property
    def failed(self) -> bool:
        return self.kind in FAILURES
