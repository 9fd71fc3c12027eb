"""Who compiles and who measures takes turns, among processes; a part that fails is told of."""

import itertools
import threading
import time

import pytest

from tests.measure.measuring_lock import LOCK, compiling, in_turn, measuring_within

COMPILES, MEASURES = 0.3, 0.1


def work(part):
    """The times at which it began and ended to compile, and to measure."""
    if part == "fails":
        raise ValueError("no such part")
    times = [time.monotonic()]
    time.sleep(COMPILES)
    times.append(time.monotonic())
    yield
    times.append(time.monotonic())
    time.sleep(MEASURES)
    yield part, (*times, time.monotonic())


@pytest.fixture(autouse=True)
def lock(monkeypatch, tmp_path):
    monkeypatch.setenv(LOCK, str(tmp_path / "lock"))


def test_all_compile_before_one_measures_and_one_measures_at_a_time():
    found = dict(in_turn(work, range(3)))
    assert sorted(found) == [0, 1, 2]
    compiled, measured = max(t[1] for t in found.values()), sorted(t[2:] for t in found.values())
    assert compiled <= measured[0][0]
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(measured))


def test_a_part_that_fails_is_told_of_and_the_others_go_on():
    told, (part, _) = sorted(in_turn(work, ["fails", "goes well"]), key=lambda found: isinstance(found, tuple))
    assert "no such part" in told
    assert part == "goes well"


def test_of_those_that_compile_one_at_a_time_measures_once_the_others_wait_or_have_ended():
    """Each opens the file anew, as processes do."""
    begun, spans = threading.Barrier(3), []

    def run(measures):
        with compiling() as file:
            begun.wait()
            if not measures:
                time.sleep(COMPILES)
                spans.append((time.monotonic(), time.monotonic()))
                return
            with measuring_within(file):
                start = time.monotonic()
                time.sleep(MEASURES)
                spans.append((start, time.monotonic()))

    threads = [threading.Thread(target=run, args=(measures,)) for measures in (True, True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(spans) == 3
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(sorted(spans)))
