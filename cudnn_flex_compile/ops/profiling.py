"""Names for profiles: an event below the op's, with the score and the mask that it computes.

Without a profiler there is no event, and its name is not made.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.profiler import record_function

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.text import infix, parse

LONGEST = 100  # characters of a name
NOTHING: AbstractContextManager[Any] = nullcontext()


def named(direction: str, program: str) -> AbstractContextManager[Any]:
    """An event around a kernel's call, such as `cudnn_flex forward: tanh(score / 20) * 20, q >= kv`."""
    return record_function(_name(direction, program)) if torch_private.profiling() else NOTHING


@functools.lru_cache(256)
def _name(direction: str, program: str) -> str:
    parsed = parse(program)
    parts = [infix(parsed.score), *([] if parsed.mask is ir.TRUE else [infix(parsed.mask)])]
    name = f"cudnn_flex {direction}: {', '.join(parts)}"
    return name if len(name) <= LONGEST else name[: LONGEST - 3] + "..."
