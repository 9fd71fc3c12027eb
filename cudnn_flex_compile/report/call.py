"""Holds what was done with one flex_attention call: the pass writes it, reports show it.

Knows nothing of how it is shown (rendering.py).
"""

from dataclasses import dataclass
from typing import Any

from cudnn_flex_compile.engine.problem import Error
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.report.picture import Picture
from cudnn_flex_compile.report.words import describe_mask
from cudnn_flex_compile.scoremod.ir import Program
from cudnn_flex_compile.scoremod.text import infix, text

BY_INDUCTOR, EAGERLY = "compiled by Inductor alone", "not compiled, or by a backend without a kernel for it"
REMEDIES = {
    BY_INDUCTOR: "call cudnn_flex_compile.install() before it is compiled, or run the script with `cudnn-flex run`",
    EAGERLY: "compile it: flex_attention = torch.compile(flex_attention), after cudnn_flex_compile.install()",
}


@dataclass(frozen=True, slots=True)
class Outside:
    """A flex_attention call that no graph of ours has.

    Attributes:
        source: where in the user's code it is.
        ran: BY_INDUCTOR or EAGERLY.
    """

    source: str
    ran: str

    @property
    def remedy(self) -> str:
        """Says how to have it lowered."""
        return REMEDIES[self.ran]


@dataclass(slots=True)
class CallReport:
    """One call.

    Attributes:
        source: where in the user's code it is.
        program: what it computes, once traced.
        strategies: of forward and backward, if lowered.
        reason: why it was kept; None if it was lowered.
        score_source, mask_source: the functions as the user wrote them; empty if that is not known.
        picture: of the mask, or why there is none; empty where there is no program.
        errors: what certification measured of the plans, on a GPU.
        expected: how many times as fast as Inductor's kernel, by the pairs that either computes; None if not known.
    """

    source: str
    program: Program | None = None
    strategies: tuple[str, ...] = ()
    reason: Reason | None = None
    score_source: str = ""
    mask_source: str = ""
    picture: Picture | str = ""
    errors: tuple[Error, ...] = ()
    expected: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it; what is not known is None."""
        program, reason = self.program, self.reason
        return {
            "source": self.source,
            "score": infix(program.score) if program else None,
            "mask": infix(program.mask) if program else None,
            "mask_bounds": describe_mask(program) if program else None,
            "program": text(program) if program else None,
            "score_source": self.score_source or None,
            "mask_source": self.mask_source or None,
            "picture": self.picture.to_dict() if isinstance(self.picture, Picture) else None,
            "strategies": list(self.strategies),
            "errors": {error.name: {"found": error.found, "stock": error.stock} for error in self.errors},
            "expected": self.expected,
            "reason": reason.to_dict() if reason else None,
        }
