"""Has the real cuDNN judge graphs on a machine without a GPU: accepted, or refused and why.

It must not know how this project builds its graphs, nor any number they yield: cuDNN accepts
graphs that it computes wrongly.
"""

from __future__ import annotations

import ctypes
import functools
import json
import subprocess
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from . import cudnn_log

CUDNN_WHEEL = "nvidia-cudnn-cu13"

_HERE = Path(__file__).parent
_STAND_IN = _HERE / "stub_cuda.c"
_RECORDED = _HERE / "h200_device_properties.json"  # by cuDNN 9.28; 9.19 and 9.26 read it too

# SM: a multiprocessor's KiB of shared memory, resident threads, resident blocks (cuda::arch_traits)
_LIMITS = {
    80: (164, 2048, 32),
    86: (100, 1536, 16),
    89: (100, 1536, 24),
    90: (228, 2048, 32),
    100: (228, 2048, 32),
    103: (228, 2048, 32),
    120: (100, 1536, 24),
}
SMS = tuple(_LIMITS)

# What cuDNN logs when the machine is not set up, which its exceptions do not tell from a refusal.
_NOT_SET_UP = ("SUBLIBRARY_LOADING_FAILED", "RUNTIME_PREREQUISITE_MISSING")


def judge(build: Callable[[dict[str, Any]], Any], sm: int) -> str | None:
    """Asks cuDNN whether it supports a graph on an architecture, without compiling a kernel.

    `build` gets the keyword arguments that name the device and returns a `cudnn.pygraph` that was
    made with them and has all its nodes. Returns None if cuDNN's own engines accept the graph (the Python engines of
    the frontend do not count), else why they refuse it: a reason a line, that of the engine most
    wanted first. Raises what `build` raises, and RuntimeError if the machine is not set up.
    """
    import cudnn

    graph = build({"device_property": device_properties(sm), "sm_version": sm})
    refusal = None
    with cudnn_log.recorded() as lines:
        try:
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            graph.check_support()
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError) as error:
            refusal = str(error)
    missing = [line for line in lines if any(status in line for status in _NOT_SET_UP)]
    if missing:
        raise RuntimeError(f"this machine is not set up to judge a graph: {missing[0]}")
    if refusal is None and graph.backend_plan_entries():
        return None
    return "\n".join(cudnn_log.reasons(lines)) or refusal or "no engine of cuDNN proposed a plan"


def device_properties(sm: int) -> Any:
    """A `device_property` for `cudnn.pygraph`: an H200's, with the limits of compute capability
    `sm` / 10. Raises ValueError for an `sm` outside `SMS`."""
    if sm not in _LIMITS:
        raise ValueError(f"no device properties for sm={sm!r}; expected one of {SMS}")
    load_libraries()
    import cudnn

    shared_kib, threads, blocks = _LIMITS[sm]
    properties = json.loads(_RECORDED.read_text())
    reserved = properties["reservedSharedMemoryPerBlock"]
    properties |= {
        "deviceName": f"SM{sm}",
        "deviceVer": 10 * sm,
        "maxSharedMemoryPerBlockOptin": 1024 * shared_kib - reserved,
        "maxThreadsPerSM": threads,
        "maxCtasPerSM": blocks,
    }
    return cudnn.create_device_properties(json.dumps(properties))


@functools.cache
def load_libraries() -> None:
    """Makes the libraries that cuDNN opens by name loadable: the real ones, else stand-ins.

    Call it before anything makes cuDNN open its engines, since cuDNN 9.28 remembers a failure.
    """
    if not _loads("libcuda.so.1"):
        _load_stand_in("libcuda.so.1")
    beside_cudnn = metadata.distribution(CUDNN_WHEEL).locate_file("nvidia/cu13/lib")
    if Path(str(beside_cudnn), "libcublasLt.so.13").exists():
        return  # cuDNN looks there first
    if not _loads("libcublasLt.so.13"):
        _load_stand_in("libcublasLt.so.13")


def _loads(soname: str) -> bool:
    try:
        ctypes.CDLL(soname)
    except OSError:
        return False
    return True


def _load_stand_in(soname: str) -> None:
    """Compiles the stand-in and loads it as `soname`, which every later dlopen then finds."""
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder, soname))
        options = ["-shared", "-fPIC", f"-Wl,-soname,{soname}"]
        subprocess.run(["cc", *options, "-o", library, str(_STAND_IN)], check=True)
        ctypes.CDLL(library)  # it stays loaded without its file: ctypes closes no library
