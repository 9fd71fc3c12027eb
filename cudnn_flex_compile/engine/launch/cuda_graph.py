"""CUDA graphs of single launches, by the driver's own interface.

Knows nothing of what is launched. `torch.cuda.CUDAGraph` is no help here: while it captures, it changes the state of
the device's random numbers, which other threads may be drawing meanwhile. The names below are there from CUDA 12 on.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Generator
from ctypes import byref, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from typing import Any

THREAD_LOCAL, RELAXED = 1, 2  # CUstreamCaptureMode
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
SIGNATURES = {
    "cuStreamCreate": (c_void_p, c_uint),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, c_void_p),
    "cuThreadExchangeStreamCaptureMode": (c_void_p,),
    "cuGraphGetNodes": (c_void_p, c_void_p, c_void_p),
    "cuGraphInstantiateWithFlags": (c_void_p, c_void_p, c_ulonglong),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphLaunch": (c_void_p, c_void_p),
}


@functools.cache
def driver() -> Any:
    """Its functions, of which each returns 0 if all is well. Raises OSError where there is none, AttributeError where
    it is too old.
    """
    library = ctypes.CDLL("libcuda.so.1")
    for name, types in SIGNATURES.items():
        getattr(library, name).argtypes = types
    return library


class Graph:
    """What a function enqueues on a stream, to be launched again and again. Freed with the object, once it has run.

    Not to be launched by two threads at once.
    """

    __slots__ = ("_executable", "_free", "_launch")

    def __init__(self, enqueue: Callable[[int], None], device: int) -> None:
        """Calls `enqueue` with a stream of the device, which must be the current one; nothing of it runs. Not for two
        threads at once. Raises RuntimeError where CUDA records nothing, and what `driver` and `enqueue` raise.
        """
        self._executable, graph = c_void_p(), c_void_p()
        self._launch, self._free = driver().cuGraphLaunch, driver().cuGraphExecDestroy
        try:
            _record(enqueue, _stream_of(device), graph)
            with _harmless():
                made = driver().cuGraphInstantiateWithFlags(byref(self._executable), graph, 0)
            _check("cuGraphInstantiate", made)
        finally:
            if graph:
                driver().cuGraphDestroy(graph)

    def launch(self, stream: int) -> bool:
        """Whether the driver has enqueued it on the stream, which must not be capturing."""
        return not self._launch(self._executable, stream)

    def __del__(self) -> None:
        if self._executable:
            self._free(self._executable)


@functools.cache
def _stream_of(device: int) -> int:
    """One on which nothing else is enqueued, ever."""
    stream = c_void_p()
    with _harmless():
        made = driver().cuStreamCreate(byref(stream), NON_BLOCKING)
    _check("cuStreamCreate", made)
    return stream.value or 0


def _record(enqueue: Callable[[int], None], stream: int, graph: c_void_p) -> None:
    count = c_size_t()
    _check("cuStreamBeginCapture", driver().cuStreamBeginCapture_v2(stream, THREAD_LOCAL))
    try:
        enqueue(stream)
    finally:
        ended = driver().cuStreamEndCapture(stream, byref(graph))
    _check("cuStreamEndCapture", ended)
    _check("cuGraphGetNodes", driver().cuGraphGetNodes(graph, None, byref(count)))
    if not count.value:
        raise RuntimeError("nothing was enqueued on the stream that was given")


@contextlib.contextmanager
def _harmless() -> Generator[None]:
    """What may allocate memory breaks no other thread's capture in here."""
    mode = c_int(RELAXED)
    _check("cuThreadExchangeStreamCaptureMode", driver().cuThreadExchangeStreamCaptureMode(byref(mode)))
    try:
        yield
    finally:
        driver().cuThreadExchangeStreamCaptureMode(byref(mode))


def _check(name: str, result: int) -> None:
    if result:
        raise RuntimeError(f"{name}: CUDA error {result}")
