"""Fills in the parts of a call's report that take work: source texts and the picture of the mask.

lower_call.py calls it, and it works only where somebody collects reports. An error here costs its part of the report,
and nothing else.
"""

import logging
from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from cudnn_flex_compile.passes.read.call import Call
from cudnn_flex_compile.passes.read.captures import Captures
from cudnn_flex_compile.passes.read.mask_picture import sketch
from cudnn_flex_compile.passes.read.source_text import source_of
from cudnn_flex_compile.report.call import CallReport
from cudnn_flex_compile.report.report import collecting
from cudnn_flex_compile.scoremod.ir import TRUE
from cudnn_flex_compile.scoremod.partition import Hoisted

log = logging.getLogger("cudnn_flex_compile")


def describe_functions(report: CallReport, call: Call) -> None:
    """Adds the source text of score_mod and mask_mod."""
    if not collecting():
        return
    try:
        report.score_source, report.mask_source = source_of(call.score_mod), source_of(call.mask_mod)
    except Exception:
        log.info("cudnn_flex: the source of a call's functions cannot be shown", exc_info=True)


def describe_mask(
    report: CallReport, call: Call, hoisted: Sequence[Hoisted], captures: Captures, real: dict[Node, Any]
) -> None:
    """Adds the picture of the mask, if there is one. The arguments are those of `sketch`."""
    if report.program is None or report.program.mask is TRUE or not collecting():
        return
    try:
        report.picture = sketch(call, report.program, hoisted, captures, real)
    except Exception as error:
        report.picture = f"the mask cannot be drawn: {type(error).__name__}"
        log.info("cudnn_flex: a mask cannot be drawn", exc_info=True)
