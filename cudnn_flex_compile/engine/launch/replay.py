"""Launches of plans on addresses that come back, as CUDA graphs of one launch each.

The work that a launch enqueues depends on the plan and the addresses alone, and in a model torch's allocator gives the
same addresses at each step. In a model code is cold, and there cuDNN's own launch takes the host much longer than the
launch of a graph. (python3 -m tests.measure.host_share)
"""

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.engine.launch.cuda_graph import Graph
from cudnn_flex_compile.locks import new_lock

Enqueue = Callable[[Any, int, int], None]  # addresses, or what has them; workspace; stream
Key = tuple[int, ...]

RECORD_AFTER = 8  # launches on the same addresses, before they are recorded
MAX_KEYS = 512  # sets of addresses of a plan whose launches are counted
# Graphs in the process; each takes 0.12 MiB of the device. (python3 -m pytest -s tests/gpu/test_replay.py)
MAX_GRAPHS = 512
EVICT_AFTER = 4 * MAX_GRAPHS  # replays of other graphs, after which a graph may be freed for a new one
# Recording takes the host one or two milliseconds, which some 30 replays save. So the first recordings are free, and
# each further one needs a number of replays before it: however addresses change, recording costs less than they save.
FREE_RECORDINGS, REPLAYS_PER_RECORDING = 64, 32
log = logging.getLogger("cudnn_flex_compile")


class GraphPool:
    """The graphs of all plans.

    Attributes:
        replays, recordings: the number of launches that were one.
        lock: guards `plans`, and everything that is recorded.
    """

    def __init__(self) -> None:
        self.replays = self.recordings = self._full_until = 0
        self.plans: weakref.WeakSet[Replays] = weakref.WeakSet()
        self.lock = new_lock()

    def reset(self) -> None:
        """Counts from zero again. Graphs are freed with their plans."""
        self.replays = self.recordings = self._full_until = 0

    def has_room(self) -> bool:
        """Whether another graph may be recorded. A graph that has not been launched for long is freed for it."""
        earned = FREE_RECORDINGS + self.replays // REPLAYS_PER_RECORDING
        if self.recordings >= earned or self.replays < self._full_until:
            return False
        used = [(last, key, plan) for plan in self.plans for key, (_, last) in list(plan.graphs.items())]
        if len(used) < MAX_GRAPHS:
            return True
        last, key, plan = min(used, key=lambda entry: entry[0])
        if self.replays - last < EVICT_AFTER:
            self._full_until = last + EVICT_AFTER  # before this replay none is freed
            return False
        return plan.graphs.pop(key, None) is not None


class Replays:
    """The launches of one plan. Any thread may run them, for no two write to the same memory at once.

    Attributes:
        graphs: by workspace and addresses, each with the number of its last replay.
    """

    __slots__ = ("__weakref__", "_device", "_enqueue", "_pool", "_seen", "graphs")

    def __init__(self, enqueue: Enqueue, device: int, pool: GraphPool) -> None:
        self._enqueue, self._device, self._pool = enqueue, device, pool
        self._seen: dict[int, int] = {}
        self.graphs: dict[Key, list[Any]] = {}
        with pool.lock:
            pool.plans.add(self)

    def run(
        self, addresses: Sequence[int], workspace: int, given: Any = None, capturing: bool | None = None
    ) -> None:  # fmt: skip
        """Launches on the current stream of the device, which must be the current one.

        Args:
            given: the argument of `enqueue` in place of the addresses, such as tensors that have them.
            capturing: whether a CUDA graph is being captured, if the caller knows.
        """
        key, stream = (workspace, *addresses), torch_private.current_stream(self._device)
        found, given = self.graphs.get(key), addresses if given is None else given
        if found is None or (torch.cuda.is_current_stream_capturing() if capturing is None else capturing):
            self._enqueue(given, workspace, stream)
            if found is None:
                self._notice(key, given, workspace)
            return
        if not found[0].launch(stream):
            self._enqueue(given, workspace, stream)
        pool = self._pool
        pool.replays += 1
        found[1] = pool.replays

    def _notice(self, key: Key, given: Any, workspace: int) -> None:
        name = hash(key)
        seen = self._seen.get(name, 0) + 1
        if len(self._seen) >= MAX_KEYS:
            self._seen.clear()
        self._seen[name] = seen
        pool = self._pool
        if seen < RECORD_AFTER or torch.cuda.is_current_stream_capturing() or not pool.lock.acquire(blocking=False):
            return
        try:
            if pool.has_room():
                self._record(key, given, workspace)
        finally:
            pool.lock.release()

    def _record(self, key: Key, given: Any, workspace: int) -> None:
        self._pool.recordings += 1
        try:
            graph = Graph(functools.partial(self._enqueue, given, workspace), self._device)
        except Exception as error:  # the launch itself has been made
            log.debug("cudnn_flex: a launch was not recorded: %s", error)
            return
        self.graphs[key] = [graph, self._pool.replays]
