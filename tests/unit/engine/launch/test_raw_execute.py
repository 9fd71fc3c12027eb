"""A launch hands the frontend the addresses in its own order, through its public entry where the quick one is missing.

Knows nothing of attention: graphs are stand-ins that note what they get.
"""

import ctypes
from types import SimpleNamespace

import pytest

from cudnn_flex_compile.engine.launch.raw_execute import launcher

UIDS = [7, 3, 9, 5]
ADDRESSES = [700, 300, 900, 500]
HANDLE = SimpleNamespace(backend_handle=42)


class Lowered:
    def __init__(self, order):
        self.order, self.got = order, None

    def _prepare_variant_pack_template(self):
        pass

    def _get_variant_pack_uids_sorted(self):
        return self.order

    def _execute_with_raw_ptrs(self, address, count, workspace, handle, plan):
        self.got = (list((ctypes.c_void_p * count).from_address(address)), workspace, handle, plan)


class Graph:
    _plan_index = 0

    def __init__(self, lowered, plans=("plan",)):
        self._lowered_graph, self.executed, self._plans = lowered, None, list(plans)

    def _materialize_backend_plan(self, index):
        return SimpleNamespace(cpp_index=self._plans.index("plan") + index + 2)

    def execute(self, buffers, workspace, handle):
        self.executed = (buffers, workspace, handle)


@pytest.mark.parametrize("order", [[3, 5, 7, 9], [3, 9]])
def test_in_the_order_of_the_graph(order):
    graph = Graph(Lowered(order))
    launcher(graph, UIDS)(ADDRESSES, 11, HANDLE)
    assert graph._lowered_graph.got == ([100 * uid for uid in order], 11, 42, 2)
    assert graph.executed is None


def test_a_restored_graph_runs_its_only_plan():
    """It lists no plans; the frontend's own `execute` gives such a one the index -1."""
    graph = Graph(Lowered([3, 5, 7, 9]), plans=())
    launcher(graph, UIDS)(ADDRESSES, 11, HANDLE)
    assert graph._lowered_graph.got == ([300, 500, 700, 900], 11, 42, -1)
    assert graph.executed is None


class Prepared:
    """As later frontends have it."""

    def __init__(self, order):
        self.uids, self.got = order, None

    def execute(self, pointers, workspace, handle):
        self.got = (pointers.typecode, pointers.tolist(), workspace, handle)


class PreparingGraph(Graph):
    def __init__(self, prepared):
        super().__init__(Lowered([3, 5, 7, 9]))
        self.prepared = prepared

    def _prepare_backend_execution(self):
        if self.prepared is None:
            raise NotImplementedError
        return self.prepared


def test_a_prepared_execution_comes_first():
    graph = PreparingGraph(Prepared([9, 3]))
    launcher(graph, UIDS)(ADDRESSES, 11, HANDLE)
    assert graph.prepared.got == ("Q", [900, 300], 11, 42)
    assert graph.executed is graph._lowered_graph.got is None


@pytest.mark.parametrize("prepared", [None, Prepared([9, 4])], ids=["refused", "of another tensor"])
def test_without_one_that_fits_the_raw_launch_is_next(prepared):
    graph = PreparingGraph(prepared)
    launcher(graph, UIDS)(ADDRESSES, 11, HANDLE)
    assert graph._lowered_graph.got == ([300, 500, 700, 900], 11, 42, 2)


class GraphByUids(Graph):
    def execute(self, buffers, workspace, handle, tensor_uids=None):
        self.executed = (dict(zip(tensor_uids, buffers, strict=True)), workspace, handle)


OTHERS = {"none": None, "other": object(), "empty": Lowered([]), "more": Lowered([3, 4])}


@pytest.mark.parametrize("lowered", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("kind", [Graph, GraphByUids])
def test_through_the_public_entry(lowered, kind):
    graph = kind(lowered)
    launcher(graph, UIDS)(ADDRESSES, 11, HANDLE)
    assert graph.executed == (dict(zip(UIDS, ADDRESSES, strict=True)), 11, HANDLE)
