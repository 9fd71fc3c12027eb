"""A handle is on the stream that it was asked for, whatever it was asked for before, and whatever failed.

Knows nothing of cuDNN: the frontend and torch's streams are stand-ins.
"""

import itertools
import threading

import cudnn
import pytest

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.engine.launch import handles
from cudnn_flex_compile.engine.launch.handles import current_handle, handle_on

CURRENT, OTHER = 5, 77


@pytest.fixture
def streams(monkeypatch):
    """The stream of each handle, and all that were set."""
    of, changes, names = {}, [], itertools.count()

    def set_stream(handle, stream):
        if stream is None:
            raise RuntimeError("cuDNN refuses")
        of[handle] = stream
        changes.append(stream)

    monkeypatch.setattr(cudnn, "create_handle", lambda: next(names))
    monkeypatch.setattr(cudnn, "set_stream", set_stream)
    monkeypatch.setattr(torch_private, "current_stream", lambda device: CURRENT + device)
    monkeypatch.setattr(handles, "_local", handles._Handles({}))
    return of, changes


def test_it_comes_back_to_the_current_stream(streams):
    of, changes = streams
    handle = current_handle(0)
    assert current_handle(0) == handle_on(0, OTHER) == handle
    assert of[handle] == OTHER
    assert current_handle(0) == current_handle(0) == handle
    assert of[handle] == CURRENT
    assert changes == [CURRENT, OTHER, CURRENT]


def test_each_device_and_thread_has_its_own(streams):
    of, _ = streams
    found = [current_handle(0), current_handle(1)]
    thread = threading.Thread(target=lambda: found.append(handle_on(0, OTHER)))
    thread.start()
    thread.join()
    assert [of[handle] for handle in found] == [CURRENT, CURRENT + 1, OTHER]


def test_where_a_stream_cannot_be_set_the_next_one_is(streams):
    of, _ = streams
    handle = handle_on(0, OTHER)
    with pytest.raises(RuntimeError, match="refuses"):
        handle_on(0, None)
    assert of[current_handle(0)] == CURRENT
    assert current_handle(0) == handle


def test_a_handle_goes_to_the_next_thread_when_its_own_ends(streams):
    """So that threads which come and go take no more handles than run at once; each is on the stream that is wanted."""
    of, changes = streams
    mine, found = current_handle(0), []

    def work(*wanted):
        found.extend(handle_on(*w) for w in wanted)

    for wanted in ([(0, OTHER)], [(0, OTHER), (0, CURRENT)], [(1, OTHER), (0, OTHER), (0, OTHER)]):
        thread = threading.Thread(target=work, args=wanted)
        thread.start()
        thread.join()
    first, again, moved, of_another_device, *back = found
    assert {first, again, moved, *back} == {first} != {mine}
    assert of_another_device not in (first, mine)
    assert (current_handle(0), of[first], of[mine]) == (mine, OTHER, CURRENT)
    assert changes == [CURRENT, OTHER, CURRENT, OTHER, OTHER]


def test_threads_at_once_share_no_handle(streams):
    barrier, found = threading.Barrier(8), []

    def work():
        barrier.wait()
        found.append(current_handle(0))
        barrier.wait()

    for _ in range(3):
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found)) == len(found) == 8
        found.clear()
    assert len(streams[0]) == 8
