"""What is asked of the CUDA driver to record a launch, and that nothing is left over, whatever fails.

Knows nothing of a GPU: the driver is a stand-in (tests/gpu/test_replay.py asks the real one).
"""

import ctypes

import pytest

from cudnn_flex_compile.engine.launch import cuda_graph as module
from cudnn_flex_compile.engine.launch.cuda_graph import RELAXED, SIGNATURES, THREAD_LOCAL, Graph

STREAM, GRAPH, EXECUTABLE, CURRENT = 11, 22, 33, 44
FAILED = 900


def put(reference, value):
    reference._obj.value = value


class Driver:
    """Notes calls, and what there is: graphs, and executables; fails where it is told to."""

    def __init__(self):
        self.calls, self.graphs, self.executables, self.mode = [], 0, 0, THREAD_LOCAL
        self.failing, self.nodes, self.capturing = None, 3, None

    def __getattr__(self, name):
        assert name in SIGNATURES, name

        def call(*arguments):
            self.calls.append(name)
            return FAILED if name == self.failing else getattr(self, f"_{name}")(*arguments) or 0

        return call

    def _cuStreamCreate(self, stream, flags):
        assert (self.mode, self.capturing) == (RELAXED, None)
        put(stream, STREAM)

    def _cuStreamBeginCapture_v2(self, stream, mode):
        assert (stream, mode, self.capturing) == (STREAM, THREAD_LOCAL, None)
        assert self.mode != RELAXED  # in which what is not recorded would run, instead of failing
        self.capturing = stream

    def _cuStreamEndCapture(self, stream, graph):
        assert stream == self.capturing
        self.capturing = None
        self.graphs += 1
        put(graph, GRAPH)

    def _cuThreadExchangeStreamCaptureMode(self, mode):
        mode._obj.value, self.mode = self.mode, mode._obj.value

    def _cuGraphGetNodes(self, graph, nodes, count):
        assert (graph.value, nodes) == (GRAPH, None)
        put(count, self.nodes)

    def _cuGraphInstantiateWithFlags(self, executable, graph, flags):
        assert (graph.value, flags, self.mode, self.capturing) == (GRAPH, 0, RELAXED, None)
        self.executables += 1
        put(executable, EXECUTABLE)

    def _cuGraphDestroy(self, graph):
        assert graph.value == GRAPH
        self.graphs -= 1

    def _cuGraphExecDestroy(self, executable):
        assert executable.value == EXECUTABLE
        self.executables -= 1

    def _cuGraphLaunch(self, executable, stream):
        assert (executable.value, stream) == (EXECUTABLE, CURRENT)


@pytest.fixture
def cuda(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(module, "driver", lambda: driver)
    module._stream_of.cache_clear()
    yield driver
    module._stream_of.cache_clear()


def test_a_launch_is_recorded_launched_and_freed(cuda):
    given = []
    graph = Graph(lambda stream: given.append((stream, cuda.capturing)), 0)
    assert given == [(STREAM, STREAM)]
    assert (cuda.graphs, cuda.executables, cuda.mode) == (0, 1, THREAD_LOCAL)
    assert graph.launch(CURRENT)
    del graph
    assert cuda.executables == 0


def test_each_device_has_one_stream(cuda):
    for device in (0, 1, 0, 1):
        Graph(lambda stream: None, device)
    assert cuda.calls.count("cuStreamCreate") == 2


@pytest.mark.parametrize("name", [name for name in SIGNATURES if name not in ("cuGraphLaunch", "cuGraphExecDestroy")])
def test_whatever_fails_nothing_is_left(cuda, name):
    cuda.failing = name
    if name == "cuGraphDestroy":  # which is told to nobody
        Graph(lambda stream: None, 0)
    else:
        with pytest.raises(RuntimeError, match=name.partition("_")[0].removesuffix("WithFlags")):
            Graph(lambda stream: None, 0)
    failed_to_end = name == "cuStreamEndCapture"
    assert cuda.capturing == (STREAM if failed_to_end else None)
    assert cuda.graphs == (name == "cuGraphDestroy")
    assert (cuda.executables, cuda.mode) == (0, THREAD_LOCAL)


def test_a_launch_that_raises_ends_the_capture(cuda):
    def refuse(stream):
        raise ValueError("cuDNN refuses")

    with pytest.raises(ValueError, match="cuDNN refuses"):
        Graph(refuse, 0)
    assert (cuda.capturing, cuda.graphs, cuda.executables) == (None, 0, 0)
    assert Graph(lambda stream: None, 0).launch(CURRENT)


def test_a_launch_on_another_stream_is_not_taken_for_an_empty_one(cuda):
    cuda.nodes = 0
    with pytest.raises(RuntimeError, match="nothing was enqueued"):
        Graph(lambda stream: None, 0)
    assert (cuda.graphs, cuda.executables) == (0, 0)


def test_a_launch_that_the_driver_refuses_is_told(cuda):
    graph = Graph(lambda stream: None, 0)
    cuda.failing = "cuGraphLaunch"
    assert not graph.launch(CURRENT)


def test_addresses_reach_the_driver_whole():
    """Without types, ctypes passes integers of 32 bits."""
    assert all(types[0] is ctypes.c_void_p for types in SIGNATURES.values())
