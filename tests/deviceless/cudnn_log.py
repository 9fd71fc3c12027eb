"""Records why cuDNN's engines refused a graph: exceptions list the engines, only the log says why.

It must not know what graph was asked about, nor judge it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

_ERRORS_AND_WARNINGS = 1 << 1 | 1 << 2  # CUDNN_SEV_ERROR_EN | CUDNN_SEV_WARNING_EN
_Callback = ctypes.CFUNCTYPE(
    None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
)  # cudnnCallback_t: severity, user data, debug information, message


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """The lines that cuDNN logs as errors or warnings inside the `with`; import cudnn before it."""
    library = ctypes.CDLL("libcudnn.so.9")
    lines: list[str] = []

    def record(severity: int, data: int, debug: int, message: int) -> None:
        while line := ctypes.string_at(message):  # lines end in a null byte, the last one is empty
            lines.append(line.decode(errors="replace").strip())
            message += len(line) + 1

    callback = _Callback(record)
    library.cudnnSetCallback(_ERRORS_AND_WARNINGS, None, callback)
    try:
        yield lines
    finally:
        library.cudnnSetCallback(0, None, None)


def reasons(lines: list[str]) -> list[str]:
    """Each distinct root cause, those of the engines that the heuristics prefer first."""
    causes, is_root = [], False
    for line in lines:
        if line.startswith("=== error stack"):
            is_root = True
        elif is_root and "Reason: " in line:
            causes.append(line.removeprefix("Warning: "))
            is_root = False
    return list(dict.fromkeys(causes))
