"""The plan cache: least recently used goes first, never more than the bound, right under threads, honest counters."""

import functools
import random
import threading
from collections import OrderedDict
from typing import Any

import pytest

from cudnn_flex_compile.engine.store.lru import Cache, CacheInfo, Recent, Uses
from cudnn_flex_compile.locks import new_lock


def bounded(bound: int) -> Cache[Any]:
    return Cache(lambda: bound, new_lock())


def held(cache: Cache[str], keys: str) -> str:
    return "".join(key for key in keys if cache.peek(key) is not None)


def test_what_was_put_is_got() -> None:
    cache = bounded(4)
    assert cache.get("a") is None
    assert cache.put("a", "plan") == "plan"
    assert cache.get("a") == "plan"
    assert cache.info() == CacheInfo(1, 1, 0, 0, 0, 0, 0, 1, 4)


def test_the_first_value_stays() -> None:
    cache = bounded(4)
    cache.put("a", "first")
    assert cache.put("a", "second") == "first"
    assert cache.get("a") == "first"


def test_the_least_recently_used_goes_first() -> None:
    cache = bounded(3)
    for key in "abc":
        cache.put(key, key)
    cache.get("a")
    cache.put("d", "d")
    assert held(cache, "abcd") == "acd"
    cache.get("c")
    cache.put("e", "e")
    cache.put("f", "f")
    assert held(cache, "abcdef") == "cef"
    assert cache.info().evictions == 3


def test_a_peek_neither_counts_nor_renews() -> None:
    cache = bounded(2)
    cache.put("a", "a")
    cache.put("b", "b")
    before = cache.info()
    assert cache.peek("a") == "a"
    assert cache.peek("x") is None
    assert cache.info() == before
    cache.put("c", "c")
    assert held(cache, "abc") == "bc"


def test_a_bound_that_changes_holds_from_the_next_plan_on() -> None:
    bounds = [5]
    cache = Cache[str](lambda: bounds[-1], new_lock())
    for key in "abcde":
        cache.put(key, key)
    bounds.append(2)
    cache.put("f", "f")
    assert held(cache, "abcdef") == "ef"
    assert cache.info().bound == 2


def test_what_was_put_last_is_remembered() -> None:
    """Also where it replaces an older value; a look at it does not renew it."""
    recent = Recent[int](3, new_lock())
    for number, key in enumerate("abcad"):
        assert recent.put(key, number) == number
        recent.get("b")
    assert [recent.get(key) for key in "abcd"] == [3, None, 2, 4]
    recent.clear()
    assert recent.get("a") is None


def test_clear_forgets_everything() -> None:
    cache = bounded(5)
    cache.put("a", "a")
    cache.get("a")
    cache.count("builds")
    cache.clear()
    assert cache.get("a") is None
    assert cache.info() == CacheInfo(0, 1, 0, 0, 0, 0, 0, 0, 5)


def test_seconds_add_up() -> None:
    cache = bounded(5)
    cache.count("certify_seconds", 0.25)
    cache.count("certify_seconds", 0.5)
    assert cache.info().certify_seconds == 0.75
    cache.clear()
    assert cache.info().certify_seconds == 0


@pytest.mark.parametrize("what", ["builds", "certifications", "rejections", "restored"])
def test_counters(what: str) -> None:
    cache = bounded(1)
    cache.count(what)
    cache.count(what)
    assert getattr(cache.info(), what) == 2
    assert sum(cache.info()[:7]) == 2


def test_an_unknown_counter_is_an_error() -> None:
    with pytest.raises(KeyError):
        bounded(1).count("build")


@pytest.mark.parametrize("bound", [1, 2, 7])
def test_any_sequence_is_that_of_a_plain_model(bound: int) -> None:
    cache, model, draw = bounded(bound), OrderedDict[int, int](), random.Random(bound)
    hits = misses = evictions = 0
    for step in range(3000):
        key = draw.randrange(12)
        if draw.random() < 0.5:
            found = cache.get(key)
            assert found == model.get(key)
            hits, misses = hits + (key in model), misses + (key not in model)
            if key in model:
                model.move_to_end(key)
        else:
            assert cache.put(key, step) == model.setdefault(key, step)
            if len(model) > bound:
                model.popitem(last=False)
                evictions += 1
    assert {key: cache.peek(key) for key in range(12) if cache.peek(key) is not None} == dict(model)
    info = cache.info()
    assert (info.hits, info.misses, info.evictions, info.size) == (hits, misses, evictions, len(model))


def test_threads() -> None:
    """Counters add up, the bound holds, and whoever puts one key gets the one value."""
    cache, threads, steps = bounded(8), 8, 2000
    failures: list[str] = []

    def work(me: int) -> None:
        draw = random.Random(me)
        for step in range(steps):
            key = draw.randrange(32)
            found = cache.get(key)
            stored = cache.put(key, (key, me * steps + step)) if found is None else found
            cache.count("builds")
            if stored[0] != key or cache.info().size > 8:
                failures.append(f"{key}: {stored}, size {cache.info().size}")

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    info = cache.info()
    assert not failures
    assert info.hits + info.misses == info.builds == threads * steps
    assert info.size == 8
    assert info.evictions >= 24


def test_racing_puts_agree() -> None:
    cache, barrier = bounded(64), threading.Barrier(8)
    got: list[list[object]] = [[] for _ in range(8)]

    def race(me: int) -> None:
        for key in range(50):
            barrier.wait(timeout=60)
            got[me].append(cache.put(key, object()))

    workers = [threading.Thread(target=race, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert all(len(set(values)) == 1 for values in zip(*got, strict=True))


@pytest.mark.parametrize("bound", [1, 2, 7])
def test_values_that_are_used_beside_the_cache_stay(bound: int) -> None:
    """Of those that nobody used since the last eviction, the least recently used goes; the newest never does."""
    cache, model, draw = bounded(bound), OrderedDict[int, int](), random.Random(bound)
    lent: dict[int, Uses] = {}
    used: dict[int, int] = {}
    cache.dropped.append(lent.clear)
    hits = 0
    for step in range(3000):
        key, now = draw.randrange(12), draw.random()
        if now < 0.4 and key in model:
            cache.lend(key, model[key], functools.partial(lent.__setitem__, key))
        elif now < 0.7 and key in lent:
            assert key in model
            lent[key].count += 1
            used[key] = used.get(key, 0) + 1
            hits += 1
        elif now > 0.995:
            cache.clear()
            hits = 0
            model.clear(), used.clear()
            assert not lent
        else:
            assert cache.put(key, step) == model.setdefault(key, step)
            if len(model) > bound:
                for each in [each for each in model if each in used]:
                    model.move_to_end(each)
                used.clear()
                model.move_to_end(key)
                model.popitem(last=False)
                assert not lent
    assert {key: cache.peek(key) for key in range(12) if cache.peek(key) is not None} == dict(model)
    assert cache.info().hits == hits


def test_a_value_that_is_gone_is_not_lent() -> None:
    cache, lent = bounded(1), list[Uses]()
    cache.put("a", 1)
    cache.lend("a", 2, lent.append)
    cache.lend("b", 1, lent.append)
    cache.put("b", 2)
    cache.lend("a", 1, lent.append)
    assert not lent
    cache.lend("b", 2, lent.append)
    cache.lend("b", 2, lent.append)
    assert lent[0] is lent[1]


@pytest.mark.parametrize("how", ["clear", "release", "forsake"])
def test_whoever_keeps_values_is_told_that_they_are_gone(how: str) -> None:
    cache, told = bounded(2), list[str]()
    cache.dropped.append(lambda: told.append(how))
    cache.put("a", 1)
    assert not told
    getattr(cache, how)()
    assert told
