"""Warns of a graph whose calls are all kept for one reason, once in a process for each reason.

backend.py calls it for each compiled graph. Whoever collects reports has the reasons there, and is not warned.
"""

import logging
from collections.abc import Sequence

from cudnn_flex_compile.locks import new_lock
from cudnn_flex_compile.reasons import Code
from cudnn_flex_compile.report.call import CallReport
from cudnn_flex_compile.report.report import collecting

log = logging.getLogger("cudnn_flex_compile")
# The codes of which nobody is warned: stock flex_attention is the faster one, the user has asked for it, or there is a
# warning of the fault itself.
QUIET = frozenset((Code.SLOWER, Code.LSE_GRADIENT, Code.FORCED_BACKEND, Code.CERTIFICATION, Code.INTERNAL))
_warned: set[Code] = set()
_lock = new_lock()


def warn_of_all_kept(calls: Sequence[CallReport]) -> None:
    reasons = [call.reason for call in calls if call.reason is not None]
    codes = {reason.code for reason in reasons}
    if len(reasons) < len(calls) or len(codes) != 1 or codes & QUIET or collecting():
        return
    with _lock:
        known = codes <= _warned
        _warned.update(codes)
    if not known:
        log.warning(
            "cudnn_flex: every flex_attention call of a graph is kept on stock flex_attention (%d of %d), for %s. "
            "To run on cuDNN: %s. This is said once.", len(calls), len(calls), reasons[0], reasons[0].advice,
        )  # fmt: skip
