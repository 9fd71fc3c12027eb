"""Plain scores under a causal mask, a causal window or none: cuDNN's own arguments, its fastest kernels.

Knows nothing of score_mods.
"""

from typing import Any

from cudnn_flex_compile.engine.lowering import Lowering
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod.ir import SCORE, TRUE, Program
from cudnn_flex_compile.scoremod.masks.form import split

NAME = "native"


def lower(program: Program, training: bool) -> Lowering | Reason:
    form = split(program.mask)
    if program.score is not SCORE or form.residual is not TRUE or any(b.terms for b in form.bounds):
        return Reason(Code.UNSUPPORTED_CALL, "native takes plain scores and constant bands only")
    bands = {b.side: b.constant for b in form.bounds}
    if not bands:
        return Lowering(NAME)
    if bands.keys() - {"lower", "upper"} or bands.get("lower") != 0 or bands.get("upper", 0) < 0:
        return Reason(Code.UNSUPPORTED_CALL, "native takes causal masks, with a window or not")
    arguments: dict[str, Any] = {"use_causal_mask": True}
    if "upper" in bands:  # cuDNN counts the query itself: q - left < kv <= q
        arguments["sliding_window_length"] = bands["upper"] + 1
    return Lowering(NAME, native=arguments)
