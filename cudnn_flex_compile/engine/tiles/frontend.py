"""Imports cudnn.flex_attention, whose kernels need a compiler of their own, and makes it keep compiled kernels.

The frontend's private names are in engine/frontend.py.
"""

import functools
import importlib

from cudnn_flex_compile.settings import settings

MODULE = "cudnn.flex_attention"
KERNELS = "interval_kernels"  # the subfolder of the cache folder in which the frontend keeps them


@functools.cache
def kernels_missing() -> str | None:
    """Why the kernels cannot be used, or None."""
    folder = settings().folder
    try:
        importlib.import_module(MODULE)
        from cudnn_flex_compile.engine.frontend import keep_kernels

        if folder is not None:
            keep_kernels(folder / KERNELS)
        return None
    except Exception as error:  # a package that is missing, or does not fit, may raise anything
        return f"{MODULE}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
