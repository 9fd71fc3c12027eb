"""Finds flex_attention calls that are in no graph of this backend: those that Inductor compiles, and eager ones.

`explain` and the command `cudnn-flex explain` listen by it, and it leaves nothing behind when they end.
"""

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch.fx import Graph

from cudnn_flex_compile import inductor_seam, torch_private
from cudnn_flex_compile.passes.read.call import FLEX_ATTENTION, find_calls
from cudnn_flex_compile.passes.read.caller import running_line
from cudnn_flex_compile.report.call import BY_INDUCTOR, EAGERLY, Outside


@contextmanager
def listening(found: Counter[Outside]) -> Generator[None]:
    """Counts the calls in `found`, as long as this lasts."""
    with _inductor(found), _eager(found):
        yield


class _Observe(torch_private.custom_graph_pass()):
    """Sees what Inductor compiles, and changes nothing."""

    lowers_flex_attention = True  # left out where Inductor compiles calls that this backend kept

    def __init__(self, found: Counter[Outside], before: Any, timing: str | None) -> None:
        self._found, self.before, self.timing, self.options = found, before, timing, None

    def __call__(self, graph: Graph) -> None:
        for other in inductor_seam.passes(self.before):
            other(graph)
        for call in find_calls(graph.owning_module) if graph.owning_module is not None else ():
            self._found[Outside(call.source, BY_INDUCTOR)] += 1

    def uuid(self) -> Any | None:
        others = inductor_seam.identity(self.before)
        return None if others is None else ("cudnn_flex observes", *others)


@contextmanager
def _inductor(found: Counter[Outside]) -> Generator[None]:
    if inductor_seam.installed() is not None:  # then the calls are in graphs of this backend
        yield
        return
    inductor_seam.put(lambda before, timing: _Observe(found, before, timing))
    try:
        yield
    finally:
        inductor_seam.take_out()


@contextmanager
def _eager(found: Counter[Outside]) -> Generator[None]:
    """Counts calls of the function that runs the op eagerly, on tensors with data."""
    kernel = torch_private.eager_kernel(FLEX_ATTENTION)
    if kernel is None:
        yield
        return

    def observed(*args: Any, **kwargs: Any) -> Any:
        found[Outside(running_line() or "unknown source", EAGERLY)] += 1
        return kernel(*args, **kwargs)

    torch_private.set_eager_kernel(FLEX_ATTENTION, observed)
    try:
        yield
    finally:
        torch_private.set_eager_kernel(FLEX_ATTENTION, kernel)
