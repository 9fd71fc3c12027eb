"""Launches a built graph with as little host work as the frontend allows.

Knows nothing of attention. The frontend's public `execute` inspects every buffer anew at each call; the entry below
it takes the addresses in the order of the uids. It is private, so where it is missing, or orders other tensors than
ours, `execute` runs.
"""

import ctypes
import operator
from collections.abc import Callable, Sequence
from typing import Any

Launch = Callable[[Sequence[int], int, Any], None]  # addresses, in the order of the uids given; workspace; handle


def launcher(graph: Any, uids: Sequence[int]) -> Launch:
    """What runs the graph's selected plan on addresses given in the order of `uids`."""
    raw = _raw(graph, uids)
    if raw is not None:
        return raw

    def execute(addresses: Sequence[int], workspace: int, handle: Any) -> None:
        graph.execute(dict(zip(uids, addresses, strict=True)), workspace, handle=handle)

    return execute


def _raw(graph: Any, uids: Sequence[int]) -> Launch | None:
    try:
        lowered = graph._lowered_graph
        run: Any = lowered._execute_with_raw_ptrs
        lowered._prepare_variant_pack_template()
        order = list(lowered._get_variant_pack_uids_sorted())
        plan = graph._materialize_backend_plan(graph._plan_index).cpp_index if graph._plans else None  # if restored
    except (AttributeError, RuntimeError, TypeError):
        return None
    if len(order) < 2 or not set(order) <= set(uids):
        return None
    in_order = operator.itemgetter(*[uids.index(uid) for uid in order])
    count, array = len(order), ctypes.c_void_p * len(order)
    index = -1 if plan is None else plan

    def launch(addresses: Sequence[int], workspace: int, handle: Any) -> None:
        pointers = array(*in_order(addresses))
        run(ctypes.addressof(pointers), count, workspace, handle.backend_handle, index)

    return launch
