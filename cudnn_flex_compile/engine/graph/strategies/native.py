"""Lowers plain scores to cuDNN's own arguments: without a mask, or under a causal mask, a causal window or lengths.

A learned bias may be added, which is an argument, too. Then any band around the diagonal is native: a score_mod would
mask before the bias is added, and cuDNN would skip no tiles.
"""

from typing import Any

from cudnn_flex_compile.engine.graph.lowering import Lowering
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod.ir import SCORE, Program
from cudnn_flex_compile.scoremod.learned import position, without_bias
from cudnn_flex_compile.scoremod.masks.bound import Bound
from cudnn_flex_compile.scoremod.masks.form import split

NAME = "native"


def lower(program: Program, training: bool) -> Lowering | Reason:
    form = split(program.mask)
    score, bias = without_bias(program.score)
    if score is not SCORE or not form.only_bounds:
        return Reason(Code.UNSUPPORTED_CALL, "native takes plain scores and bounds only")
    bands = {b.side: b.constant for b in form.bounds if not b.terms}
    lengths = [b for b in form.bounds if b.terms]
    if len(bands) + len(lengths) < len(form.bounds) or len(lengths) > 1 or not all(map(_is_length, lengths)):
        return Reason(Code.UNSUPPORTED_CALL, "native takes constant bands and one length a batch entry only")
    if bands.keys() - {"lower", "upper"} or min(bands.values(), default=0) < 0:
        return Reason(Code.UNSUPPORTED_CALL, "native takes bands around the diagonal only")
    if bands and bands.get("lower") != 0 and bias is None:
        return Reason(Code.UNSUPPORTED_CALL, "native takes causal masks, with a window or not")
    arguments: dict[str, Any] = {}
    if "lower" in bands:
        arguments |= {"diagonal_band_right_bound": bands["lower"]} if bands["lower"] else {"use_causal_mask": True}
    if "upper" in bands:  # cuDNN counts the query itself: q - left < kv <= q
        arguments["sliding_window_length"] = bands["upper"] + 1
    operands = [term for bound in lengths for _, term in bound.terms]
    length = int(operands[0].value or 0) if operands else None
    return Lowering(NAME, native=arguments, lengths=length, leaves=tuple(operands), bias=position(program))


def _is_length(bound: Bound) -> bool:
    """kv < operand[b]"""
    plain = bound.side == "end" and bound.constant == -1 and len(bound.terms) == 1
    return plain and bound.terms[0][1].kind == "operand" and bound.terms[0][1].dims == "b"
