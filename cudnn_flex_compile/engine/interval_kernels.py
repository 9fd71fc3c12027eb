"""Imports cudnn.flex_attention, whose kernels take a compiler of its own, and has it keep what it compiles.

Knows nothing of problems. Compiling takes seconds; the frontend keeps the kernels in a folder if two variables of the
environment, which it reads when it is imported, say so.
"""

import functools
import importlib
import logging
import os

from cudnn_flex_compile.settings import settings

log = logging.getLogger("cudnn_flex_compile")
MODULE = "cudnn.flex_attention"
VARIABLES = "FLEX_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLEX_ATTENTION_CUTE_DSL_CACHE_DIR"
LOUD = ("dispatch", "plan.builder")  # they print what they compiled
KERNELS = "interval_kernels"  # the subfolder of the cache folder in which the frontend keeps them


@functools.cache
def intervals_missing() -> str | None:
    """Why the kernels cannot be used, or None."""
    folder = settings().folder
    if folder is not None and not any(name in os.environ for name in VARIABLES):
        os.environ.update(dict(zip(VARIABLES, ("1", str(folder / KERNELS)), strict=True)))
    try:
        importlib.import_module(MODULE)
        for name in LOUD:
            module = importlib.import_module(f"{MODULE}.{name}")
            module.print = log.debug  # pyright: ignore[reportAttributeAccessIssue]
        return None
    except Exception as error:  # whatever a package that is missing, or does not fit, makes of it
        return f"{MODULE}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
