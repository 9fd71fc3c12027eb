"""CUDA graphs of single launches, by the driver's own interface.

replay.py records launches with it. `torch.cuda.CUDAGraph` does not serve: while it captures, it changes the state of
the device's random numbers, which other threads may be drawing meanwhile. CUDA has the names below since version 12.
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
    """The driver's library, whose functions return 0 if all is well.

    Raises OSError where there is none, and AttributeError where it is too old.
    """
    library = ctypes.CDLL("libcuda.so.1")
    for name, types in SIGNATURES.items():
        getattr(library, name).argtypes = types
    return library


class Graph:
    """A recording of the work that a function enqueues on a stream, which can be launched again and again.

    Two threads must not launch it at once. Its memory is freed with the object, once it has run.
    """

    __slots__ = ("_executable", "_free", "_launch")

    def __init__(self, enqueue: Callable[[int], None], device: int) -> None:
        """Records what `enqueue` does with a stream of the device, which must be the current one; nothing runs.

        Two threads must not record at once. Raises RuntimeError where CUDA records nothing, and the errors of `driver`
        and `enqueue`.
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
        """Launches the recording on a stream that is not capturing; false where the driver refuses."""
        return not self._launch(self._executable, stream)

    def __del__(self) -> None:
        if self._executable:
            self._free(self._executable)


@functools.cache
def _stream_of(device: int) -> int:
    """A stream of the device that only recordings use."""
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
    """Lets calls that allocate memory break no other thread's capture."""
    mode = c_int(RELAXED)
    _check("cuThreadExchangeStreamCaptureMode", driver().cuThreadExchangeStreamCaptureMode(byref(mode)))
    try:
        yield
    finally:
        driver().cuThreadExchangeStreamCaptureMode(byref(mode))


def _check(name: str, result: int) -> None:
    if result:
        raise RuntimeError(f"{name}: CUDA error {result}")
