"""Finds the line of the user's code that runs now, for reports of calls for which Dynamo recorded no line."""

import sys
from pathlib import Path

import torch

FOREIGN = (Path(torch.__file__).parent, Path(__file__).parents[2])  # no user's code is in these folders


def running_line() -> str | None:
    """The innermost line that is neither torch's nor ours, as tracebacks write it; None if there is none."""
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.exists() and not any(path.is_relative_to(folder) for folder in FOREIGN):
            return f'File "{path}", line {frame.f_lineno}, in {frame.f_code.co_name}'
        frame = frame.f_back
    return None
