"""Which launches are recorded, and replayed; graphs are stand-ins that note what they enqueue.

Knows nothing of CUDA (tests/gpu/test_replay.py has real graphs).
"""

import gc
import weakref

import pytest
import torch

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.engine.launch import replay
from cudnn_flex_compile.engine.launch.replay import (
    EVICT_AFTER,
    FREE_RECORDINGS,
    RECORD_AFTER,
    REPLAYS_PER_RECORDING,
    GraphPool,
    Replays,
)

CURRENT, CAPTURING = 5, 77


class Machine:
    """Notes what is enqueued, and by which way."""

    def __init__(self):
        self.direct, self.replayed, self.recorded = [], [], []
        self.pool = GraphPool()
        self.capturing = self.refusing = False
        self.failing = None

    def enqueue(self, addresses, workspace, stream):
        assert stream == CURRENT or not self.capturing
        (self.direct if stream == CURRENT else self.recorded).append((workspace, *addresses))

    def plan(self):
        return Replays(self.enqueue, 3, self.pool)

    def graph(self, enqueue, device):
        assert device == 3
        if self.failing:
            raise self.failing
        enqueue(CAPTURING)
        return Graph(self, self.recorded[-1])


class Graph:
    def __init__(self, machine, what):
        self.machine, self.what = machine, what

    def launch(self, stream):
        assert stream == CURRENT
        if not self.machine.refusing:
            self.machine.replayed.append(self.what)
        return not self.machine.refusing


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(replay, "Graph", machine.graph)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: machine.capturing)
    monkeypatch.setattr(torch_private, "current_stream", lambda device: CURRENT)
    return machine


@pytest.fixture
def replays(machine):
    return machine.plan()


def test_what_comes_often_is_recorded_once_and_replayed(machine, replays):
    for _ in range(RECORD_AFTER + 5):
        replays.run([1, 2], 9)
    assert machine.direct == [(9, 1, 2)] * RECORD_AFTER
    assert machine.recorded == [(9, 1, 2)]
    assert machine.replayed == [(9, 1, 2)] * 5
    assert machine.pool.replays == 5


def test_each_launch_has_its_own_addresses(machine, replays):
    for _ in range(RECORD_AFTER + 2):
        for addresses in ([1, 2], [2, 1]):
            for workspace in (0, 9):
                replays.run(addresses, workspace)
    assert sorted(machine.replayed) == sorted(2 * [(0, 1, 2), (9, 1, 2), (0, 2, 1), (9, 2, 1)])


def test_tensors_are_enqueued_and_known_by_their_addresses(machine, monkeypatch):
    tensors, enqueued = [torch.zeros(2), torch.ones(2)], []
    replays = Replays(lambda *what: enqueued.append(what) or machine.recorded.append(what), 3, machine.pool)
    for _ in range(RECORD_AFTER + 2):
        replays.run([t.data_ptr() for t in tensors], 9, tensors)
    assert enqueued == [(tensors, 9, CURRENT)] * RECORD_AFTER + [(tensors, 9, CAPTURING)]
    assert machine.pool.replays == 2


def test_what_does_not_come_back_is_not_recorded(machine, replays):
    for i in range(10 * replay.MAX_KEYS):
        replays.run([i], 0)
    assert machine.recorded == []
    assert len(machine.direct) == 10 * replay.MAX_KEYS
    assert len(replays._seen) <= replay.MAX_KEYS


def test_recording_is_paid_by_replays(machine, replays):
    """Addresses that are given up once they are recorded."""
    for i in range(1000):
        for _ in range(RECORD_AFTER):
            replays.run([i], 0)
    assert len(machine.recorded) == FREE_RECORDINGS
    for _ in range(3 * REPLAYS_PER_RECORDING):
        replays.run([0], 0)
    for i in range(1000, 2000):
        for _ in range(RECORD_AFTER):
            replays.run([i], 0)
    assert len(machine.recorded) == FREE_RECORDINGS + 3


def test_all_layers_of_a_model_are_recorded_in_the_end(machine, replays):
    for _ in range(100):
        for layer in range(4 * FREE_RECORDINGS):
            replays.run([layer], 0)
    assert len(machine.recorded) == 4 * FREE_RECORDINGS
    del machine.direct[:]
    for layer in range(4 * FREE_RECORDINGS):
        replays.run([layer], 0)
    assert machine.direct == []


def test_graphs_of_all_plans_are_bounded_and_those_not_launched_for_long_go(machine, replays, monkeypatch):
    monkeypatch.setattr(replay, "MAX_GRAPHS", 4)
    other = machine.plan()

    def often(of_plan, address):
        for _ in range(RECORD_AFTER + REPLAYS_PER_RECORDING):
            of_plan.run([address], 0)

    for address in range(2):
        often(replays, address)
        often(other, address)
    often(other, 2)  # the others were launched not long ago
    assert [list(of_plan.graphs) for of_plan in (replays, other)] == [[(0, 0), (0, 1)], [(0, 0), (0, 1)]]
    for _ in range(EVICT_AFTER):
        replays.run([1], 0)
    often(other, 2)
    assert [list(of_plan.graphs) for of_plan in (replays, other)] == [[(0, 1)], [(0, 0), (0, 1), (0, 2)]]
    before = len(machine.direct)
    often(replays, 0)
    assert len(machine.direct) == before + 1  # it has come often enough before
    assert [list(of_plan.graphs) for of_plan in (replays, other)] == [[(0, 1), (0, 0)], [(0, 1), (0, 2)]]


class Counted(weakref.WeakSet):
    iterations = 0

    def __iter__(self):
        self.iterations += 1
        return super().__iter__()


def test_none_that_is_in_use_goes_and_it_is_seldom_looked_for(machine, replays, monkeypatch):
    monkeypatch.setattr(replay, "MAX_GRAPHS", 4)
    machine.pool.plans = Counted(machine.pool.plans)
    for _ in range(1000):
        for layer in range(6):
            replays.run([layer], 0)
    assert len(machine.recorded) == 4
    assert machine.pool.plans.iterations <= 4 + 1 + 4 * 1000 // (EVICT_AFTER - 10)


def test_a_capture_gets_the_launch_itself(machine, replays):
    for _ in range(RECORD_AFTER + 1):
        replays.run([1], 0)
    machine.capturing = True
    for address in (1, 2):
        for _ in range(2 * RECORD_AFTER):
            replays.run([address], 0)
    assert len(machine.recorded) == 1
    assert len(machine.replayed) == 1
    assert machine.direct[RECORD_AFTER:] == [(0, 1)] * 2 * RECORD_AFTER + [(0, 2)] * 2 * RECORD_AFTER


@pytest.mark.parametrize("error", [RuntimeError("CUDA records nothing"), OSError("no driver"), KeyError("anything")])
def test_what_cannot_be_recorded_is_launched(machine, replays, error):
    machine.failing = error
    for _ in range(1000):
        replays.run([1], 0)
    assert len(machine.direct) == 1000
    assert machine.pool.recordings == FREE_RECORDINGS


def test_what_cannot_be_replayed_is_launched(machine, replays):
    for _ in range(RECORD_AFTER):
        replays.run([1], 0)
    machine.refusing = True
    replays.run([1], 0)
    assert len(machine.direct) == RECORD_AFTER + 1
    assert machine.replayed == []


def test_a_recording_elsewhere_is_not_waited_for(machine, replays):
    with machine.pool.lock:
        for _ in range(RECORD_AFTER):
            replays.run([1], 0)
    assert machine.recorded == []
    replays.run([1], 0)
    assert machine.recorded == [(0, 1)]


def test_graphs_go_with_their_plan(machine):
    """At once, not when garbage is collected."""
    gc.disable()
    try:
        replays = machine.plan()
        for _ in range(RECORD_AFTER):
            replays.run([1], 0)
        graph = weakref.ref(next(iter(replays.graphs.values()))[0])
        del replays
        assert graph() is None
        assert not machine.pool.plans
    finally:
        gc.enable()
