"""`engine` holds everything that this process remembers of plans, so that one lock and one reset serve all of it.

find_plan.py, certification and the chooser keep their maps here. All compiles share it, so options of one compile are
not in it: they are in the keys of its plans (config.Policy).
"""

import atexit
import os
from collections.abc import Callable, Hashable
from typing import Any

from cudnn_flex_compile.engine.certify.reference import Reference
from cudnn_flex_compile.engine.launch.replay import GraphPool
from cudnn_flex_compile.engine.store.files import Store
from cudnn_flex_compile.engine.store.lru import Cache, Recent
from cudnn_flex_compile.engine.store.plan_cache import CachedPlan
from cudnn_flex_compile.locks import new_lock
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.settings import forget as forget_settings
from cudnn_flex_compile.settings import settings

REFERENCES, COVERAGE, TIMES = 256, 1024, 1024  # the number of entries that are remembered, the last ones


class Engine:
    """Any thread may use it.

    Attributes:
        lock: guards the maps below, and is held for moments.
        building: held while a plan is found, which may take seconds.
        plans: the certified plan, or the reason why there is none, by the keys of calls (engine/key.py).
        references: the users' functions that plans are compared with, by program and sizes (engine/find_plan.py).
        coverage: the classes of plans that were certified in full, so that a new shape of one takes fewer regimes
            (engine/certify/coverage.py).
        times: what was measured, by everything that it depends on: the kernel times of contenders
            (passes/decide/measured_times.py), and whether kernels end (engine/tiles/ordered.py).
        graph_pool: the launches that are replayed.
        also_clear: drops what others keep for plans, such as lists of tiles.
    """

    def __init__(self) -> None:
        self.lock, self.building = new_lock(), new_lock()
        self.plans: Cache[CachedPlan | Reason] = Cache(lambda: settings().plan_cache_size, self.lock)
        self.references: Recent[Reference] = Recent(REFERENCES, self.lock)
        self.coverage: Recent[bool] = Recent(COVERAGE, self.lock)
        self.times: Recent[Any] = Recent(TIMES, self.lock)
        self.graph_pool = GraphPool()
        self.also_clear: list[Callable[[], None]] = []
        self._store: tuple[Hashable, Store | None] = (), None

    @property
    def store(self) -> Store | None:
        """The store of verdicts beyond the process, or None; the same one while the settings stay."""
        given = settings()
        wanted = given.folder, given.cache_mb
        with self.lock:
            if self._store[0] != wanted:
                self._store = wanted, None if given.folder is None else Store(given.folder, given.cache_mb * 2**20)
            return self._store[1]

    def clear(self) -> None:
        """Drops all plans but those that a CUDA graph captured, and the coverage; zeroes all counts."""
        self.plans.clear()
        self.coverage.clear()
        for drop in self.also_clear:
            drop()

    def reset(self) -> None:
        """Forgets all that the process knows, its settings, too. For tests."""
        self.clear()
        self.references.clear()
        self.times.clear()
        self.graph_pool.reset()
        forget_settings()
        with self.lock:
            self._store = (), None

    def release(self) -> None:
        """Frees all plans while CUDA and cuDNN are loaded: objects that modules hold may be freed after these are gone.
        """
        self.plans.release()

    def forsake(self) -> None:
        """Drops everything in the child of a fork. It frees nothing there, in the CUDA context of the parent."""
        for table in (self.plans, self.references, self.coverage, self.times):
            table.forsake()


engine = Engine()
atexit.register(engine.release)
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=engine.forsake)
