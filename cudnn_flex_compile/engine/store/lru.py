"""Bounded, thread-safe maps: `Recent` keeps the last values put, and `Cache` the values used last, with counters.

engine/state.py holds the maps of the process. Keys and values are opaque here.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, Literal, NamedTuple, TypeVar, get_args

from cudnn_flex_compile import phases

Value = TypeVar("Value")
Counter = Literal[
    "hits", "misses", "builds", "certifications", "rejections", "restored", "evictions", "certify_seconds"
]  # fmt: skip


class CacheInfo(NamedTuple):
    """hits, misses: look-ups. builds: plans built. certifications: plans checked. rejections: checks failed.
    restored: verdicts taken from the cache folder. evictions: plans dropped for room. size, bound: plans held, and at
    most. certify_seconds: what the checks took."""

    hits: int
    misses: int
    builds: int
    certifications: int
    rejections: int
    restored: int
    evictions: int
    size: int
    bound: int
    certify_seconds: float = 0.0


class Uses:
    """Counts the look-ups that a value spared which is kept beside the cache.

    Attributes:
        count: since the cache last asked. Threads that count at once may lose some.
    """

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Recent(Generic[Value]):
    """Maps keys to values; keeps the last `bound` that were put.

    Args:
        lock: held for moments; maps may share one.
    """

    def __init__(self, bound: int, lock: threading.Lock) -> None:
        self._entries: OrderedDict[Hashable, Value] = OrderedDict()
        self._forsaken: tuple[Any, ...] = ()
        self._lock = lock
        self.bound = bound

    def get(self, key: Hashable) -> Value | None:
        with self._lock:
            return self._entries.get(key)

    def put(self, key: Hashable, value: Value) -> Value:
        """Stores the value in place of an older one, and returns it."""
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            while len(self._entries) > self.bound:
                self._entries.popitem(last=False)
            return value

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def forsake(self) -> None:
        """Lets go of all values without freeing them, in the child of a fork, where no other thread is."""
        self._forsaken, self._entries = (self._forsaken, self._entries), OrderedDict()


class Cache(Generic[Value]):
    """Maps keys to values; drops the least recently used beyond `bound()`.

    Args:
        lock: held for moments; maps may share one.

    Attributes:
        dropped: functions that are called, with the lock held, whenever a value is no longer in the cache.
    """

    def __init__(self, bound: Callable[[], int], lock: threading.Lock) -> None:
        self._entries: OrderedDict[Hashable, Value] = OrderedDict()
        self._uses: dict[Hashable, Uses] = {}
        self.dropped: list[Callable[[], None]] = []
        self._held: dict[int, Value] = {}
        self._forsaken: tuple[Any, ...] = ()
        self._lock = lock
        self._bound = bound
        self.counts: dict[Counter, float] = dict.fromkeys(get_args(Counter), 0)

    def get(self, key: Hashable) -> Value | None:
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self.counts["misses"] += 1
            else:
                self._entries.move_to_end(key)
                self.counts["hits"] += 1
            return found

    def peek(self, key: Hashable) -> Value | None:
        """Like get, without counting or renewing."""
        with self._lock:
            return self._entries.get(key)

    def put(self, key: Hashable, value: Value) -> Value:
        """Stores the value, unless another thread was first, and returns the stored one."""
        bound = self._bound()
        with self._lock:
            value = self._entries.setdefault(key, value)
            while len(self._entries) > bound:
                self._evict()
            return value

    def lend(self, key: Hashable, value: Value, keep: Callable[[Uses], None]) -> None:
        """Has a caller keep a value beside the cache, unless it is no longer in it, and count its uses there.

        Args:
            keep: called with the lock held, so that the value is not dropped meanwhile; `dropped` undoes it.
        """
        with self._lock:
            if self._entries.get(key) is value:
                keep(self._uses.setdefault(key, Uses()))

    def _evict(self) -> None:
        newest = next(reversed(self._entries))
        self._renew()
        self._entries.move_to_end(newest)
        key, _ = self._entries.popitem(last=False)
        self._uses.pop(key, None)
        self.counts["evictions"] += 1
        self._tell()

    def _renew(self) -> None:
        """Makes the values that were used beside the cache those used last, and counts these uses."""
        for key, uses in self._uses.items():
            if uses.count:
                self.counts["hits"] += uses.count
                uses.count = 0
                self._entries.move_to_end(key)

    def _tell(self) -> None:
        for function in self.dropped:
            function()

    def values(self) -> list[Value]:
        """All values, the least recently used first."""
        with self._lock:
            return list(self._entries.values())

    def count(self, what: Counter, amount: float = 1) -> None:
        phases.count(what, amount)
        with self._lock:
            self.counts[what] += amount

    def hold(self, value: Value) -> None:
        """Keeps a value alive until `release`, dropped from the cache or not."""
        with self._lock:
            self._held[id(value)] = value

    def forsake(self) -> None:
        """Lets go of all values without freeing them, in the child of a fork, where no other thread is."""
        self._forsaken = (self._forsaken, self._entries, self._held)
        self._entries, self._held, self._uses = OrderedDict(), {}, {}
        self._tell()

    def release(self) -> None:
        """Drops all values, held ones, too."""
        self.clear()
        with self._lock:
            self._held.clear()

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._uses.clear()
            self.counts = dict.fromkeys(self.counts, 0)
            self._tell()

    def info(self) -> CacheInfo:
        bound = self._bound()
        with self._lock:
            self._renew()
            return CacheInfo(**self.counts, size=len(self._entries), bound=bound)  # pyright: ignore
