"""`Lowering` is the form in which a strategy expresses a program: data, and two functions that write graph nodes.

It imports no cudnn, so that strategies can be asked (and explained) where cuDNN is not installed. build.py makes the
graph from it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cudnn_flex_compile.scoremod.ir import Expr

if TYPE_CHECKING:
    from cudnn_flex_compile.engine.graph.emit import Emitter


@dataclass(frozen=True, slots=True)
class Lowering:
    """A program as a strategy expresses it.

    Attributes:
        strategy: its name.
        native: arguments of sdpa and sdpa_backward (causal, bands); empty with a score_mod.
        score_mod: writes the modified, masked score, given an emitter on the raw score; None without one.
        score_mod_bprop: writes the gradient of the raw score, given the emitter of score_mod and one whose grad
            is set; None where the gradient passes unchanged.
        bias: the position of the learned operand, [B or 1, H or 1, Sq, Skv]; None without one. cuDNN adds it to
            score_mod's result, and its gradient is that of the sum.
        lengths: the position of the operand that holds the number of visible keys, [B, 1, 1, 1]; None without one.
        expanded: whether operands are declared for all batch entries and heads, with stride 0 where these share them.
        leaves: every expression whose leaves the callbacks read.
    """

    strategy: str
    native: dict[str, Any] = field(default_factory=dict[str, Any])
    score_mod: "Callable[[Emitter], Any] | None" = None
    score_mod_bprop: "Callable[[Emitter], Any] | None" = None
    leaves: tuple[Expr, ...] = ()
    bias: int | None = None
    lengths: int | None = None
    expanded: bool = False
