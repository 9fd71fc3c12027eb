"""`CallReport` records how one flex_attention call was lowered, or why it was kept.

The pass fills it in, and report.py collects it. render.py shows it.
"""

import dataclasses
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
    """A flex_attention call that is in no graph of this backend.

    Attributes:
        source: where in the user's code it is.
        ran: BY_INDUCTOR or EAGERLY.
    """

    source: str
    ran: str

    @property
    def remedy(self) -> str:
        """The change to the user's code with which the call is lowered."""
        return REMEDIES[self.ran]


@dataclass(frozen=True, slots=True)
class Contender:
    """A way in which a call could run.

    Attributes:
        name: "inductor", "graphs", or "tile lists (forward)".
        milliseconds: the time that it takes of a step, forward and backward.
        measured: whether its kernels were timed on this device, or are predicted.
        won: whether the call runs so.
    """

    name: str
    milliseconds: float
    measured: bool = False
    won: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.milliseconds:.3f} ms"


@dataclass(slots=True)
class CallReport:
    """One call.

    Attributes:
        source: where in the user's code it is.
        program: its score and mask, once traced.
        strategies: those of forward and backward, if lowered.
        reason: why it was kept; None if it was lowered.
        score_source, mask_source: the functions as the user wrote them; empty if their text is not known.
        picture: the picture of the mask, or why there is none; empty where there is no program.
        errors: the errors of the plans that certification measured, on a GPU.
        contenders: the ways that were compared, the fastest first; empty where there was no choice.
    """

    source: str
    program: Program | None = None
    strategies: tuple[str, ...] = ()
    reason: Reason | None = None
    score_source: str = ""
    mask_source: str = ""
    picture: Picture | str = ""
    errors: tuple[Error, ...] = ()
    contenders: tuple[Contender, ...] = ()

    @property
    def expected(self) -> float | None:
        """The speed relative to Inductor's kernel, as predicted or measured; None if it is not known."""
        stock = next((c.milliseconds for c in self.contenders if c.name == "inductor"), None)
        ours = next((c.milliseconds for c in self.contenders if c.won and c.name != "inductor"), None)
        return stock / ours if stock and ours else None

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON takes it; unknown values are None."""
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
            "contenders": [dataclasses.asdict(contender) for contender in self.contenders],
            "reason": reason.to_dict() if reason else None,
        }
