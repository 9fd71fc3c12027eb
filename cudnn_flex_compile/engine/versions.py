"""Versions of the libraries, and whether they can run anything at all here.

It imports cudnn lazily: a machine without it can still compile and explain.
"""

import functools
import importlib

import torch

from cudnn_flex_compile.reasons import Code, Reason

MINIMUM_CUDNN = 91900
MINIMUM_CAPABILITY = (8, 0)


@functools.cache
def cudnn_missing() -> str | None:
    """Why cudnn cannot be used, or None. The frontend imports without its library, and fails when it is called."""
    try:
        importlib.import_module("cudnn").backend_version()
        return None
    except Exception as error:  # the frontend raises ImportError, RuntimeError or OSError, by what is missing
        return f"{type(error).__name__}: {error}"


@functools.cache
def cudnn_version() -> int:
    """The version of the cuDNN library, as 91900 for 9.19.0."""
    import cudnn

    return int(cudnn.backend_version())


@functools.cache
def packages() -> tuple[str, ...]:
    """The versions of torch and of the frontend, on which kernels depend that cuDNN's library has no part in."""
    import cudnn

    return (torch.__version__, cudnn.__version__)


@functools.cache
def versions() -> tuple[str, ...]:
    """The versions that a plan depends on besides its problem."""
    return (*packages(), str(cudnn_version()))


@functools.cache
def unusable_device(index: int) -> Reason | None:
    """Why no plan can run on this CUDA device, or None."""
    missing = cudnn_missing()
    if missing is not None:
        return Reason(Code.CUDNN_MISSING, missing)
    if cudnn_version() < MINIMUM_CUDNN:
        return Reason(Code.CUDNN_OLD, f"cuDNN {cudnn_version()} is installed, {MINIMUM_CUDNN} or newer is needed")
    capability = torch.cuda.get_device_capability(index)
    if capability < MINIMUM_CAPABILITY:
        return Reason(Code.DEVICE, f"compute capability {capability} is below {MINIMUM_CAPABILITY}")
    return None
