"""A bounded, thread-safe, least-recently-used cache of plans and refusals, with counters.

Knows nothing of what a key or a plan is.
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Generic, Literal, NamedTuple, TypeVar, get_args

from cudnn_flex_compile import phases
from cudnn_flex_compile.locks import new_lock

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


class Cache(Generic[Value]):
    """Maps keys to values; drops the least recently used beyond `bound`."""

    def __init__(self, bound: int) -> None:
        self._entries: OrderedDict[Hashable, Value] = OrderedDict()
        self._held: dict[int, Value] = {}
        self._forsaken: tuple[Any, ...] = ()
        self._lock = new_lock()
        self.bound = bound
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
        """Stores the value, unless another thread was first; gives back what is stored."""
        with self._lock:
            value = self._entries.setdefault(key, value)
            self._shrink()
            return value

    def count(self, what: Counter, amount: float = 1) -> None:
        phases.count(what, amount)
        with self._lock:
            self.counts[what] += amount

    def resize(self, bound: int) -> None:
        with self._lock:
            self.bound = bound
            self._shrink()

    def _shrink(self) -> None:
        while len(self._entries) > self.bound:
            self._entries.popitem(last=False)
            self.counts["evictions"] += 1

    def hold(self, value: Value) -> None:
        """Keeps a value alive until `release`, dropped from the cache or not."""
        with self._lock:
            self._held[id(value)] = value

    def forsake(self) -> None:
        """Lets go of all values without freeing them."""
        self._forsaken, self._entries, self._held = (self._entries, self._held), OrderedDict(), {}

    def release(self) -> None:
        """Drops all values, held ones, too."""
        self.clear()
        with self._lock:
            self._held.clear()

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.counts = dict.fromkeys(self.counts, 0)

    def info(self) -> CacheInfo:
        with self._lock:
            return CacheInfo(**self.counts, size=len(self._entries), bound=self.bound)  # pyright: ignore
