"""Every private name of cuDNN's frontend (the package `cudnn`) that is used, once, and the way to do without it.

This file may import the frontend, and nothing of attention. The names were seen in nvidia-cudnn-frontend 1.32; those
that a later one has in their place come first. `missing()` lists what this one lacks.
"""

import contextlib
import ctypes
import functools
import importlib
import inspect
import logging
import operator
import threading
from array import array
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import cudnn

from cudnn_flex_compile.locks import new_lock, new_reentrant_lock

Launch = Callable[[Sequence[int], int, Any], None]  # addresses, in the order of the uids given; workspace; handle

log = logging.getLogger("cudnn_flex_compile")


# Launching. `pygraph.execute` looks at every buffer at each call. All faster ways are private.
def prepared_launch(graph: Any, uids: Sequence[int]) -> Launch | None:
    """A launch by `_prepare_backend_execution`, which later frontends have for this; None where it is missing."""
    prepare = getattr(graph, "_prepare_backend_execution", None)
    if prepare is None:
        return None
    try:
        prepared = prepare()
        order = list(prepared.uids)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None
    in_order = _picker(order, uids)
    if in_order is None:
        return None
    execute: Any = prepared.execute

    def launch(addresses: Sequence[int], workspace: int, handle: Any) -> None:
        execute(array("Q", in_order(addresses)), workspace=workspace, handle=handle.backend_handle)

    return launch


def raw_launch(graph: Any, uids: Sequence[int]) -> Launch | None:
    """A launch by the functions that frontend 1.32's `execute` itself calls; None where one is missing."""
    try:
        lowered = graph._lowered_graph
        run: Any = lowered._execute_with_raw_ptrs
        lowered._prepare_variant_pack_template()
        order = list(lowered._get_variant_pack_uids_sorted())
        plan = graph._materialize_backend_plan(graph._plan_index).cpp_index if graph._plans else None  # if restored
    except (AttributeError, RuntimeError, TypeError):
        return None
    in_order = _picker(order, uids)
    if in_order is None:
        return None
    count, array_of = len(order), ctypes.c_void_p * len(order)
    index = -1 if plan is None else plan

    def launch(addresses: Sequence[int], workspace: int, handle: Any) -> None:
        pointers = array_of(*in_order(addresses))
        run(ctypes.addressof(pointers), count, workspace, handle.backend_handle, index)

    return launch


def public_launch(graph: Any, uids: Sequence[int]) -> Launch:
    """A launch by `execute`: by uids where it takes them, else by a mapping."""
    if "tensor_uids" in inspect.signature(graph.execute).parameters:
        given = tuple(uids)

        def by_uids(addresses: Sequence[int], workspace: int, handle: Any) -> None:
            graph.execute(list(addresses), workspace, handle=handle, tensor_uids=given)

        return by_uids

    def by_mapping(addresses: Sequence[int], workspace: int, handle: Any) -> None:
        graph.execute(dict(zip(uids, addresses, strict=True)), workspace, handle=handle)

    return by_mapping


def _picker(order: Sequence[int], uids: Sequence[int]) -> Callable[[Sequence[int]], tuple[int, ...]] | None:
    """A function that takes the addresses of `uids` and returns them in another order; None where the order names other
    uids, or too few to be a graph's.
    """
    if len(order) < 2 or not set(order) <= set(uids):
        return None
    return operator.itemgetter(*[uids.index(uid) for uid in order])


# Note [Callbacks of a lowered graph]. Frontend 1.32 (`_pygraph._wrap_callback`) wraps a score_mod, and the wrapper
# holds the closure that lowers tensors, which holds the C++ graph, which holds the wrapper. Python's collector does
# not see through C++, so each such graph, with the kernels of its plan, would stay for ever, and nanobind would list
# it at exit. So while a graph of ours is lowered, in its thread, the wrapper is given a Link in place of that
# closure, and the link is cut once the graph is built or refused. It may go when the wrapper lets go of the graph by
# itself; there is no issue upstream yet. Without the name, nothing is replaced, and graphs may stay.
class Link:
    """A function that the maker of the link can release."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function: Callable[..., Any] | None = function

    def __call__(self, *arguments: Any) -> Any:
        if self._function is None:
            raise RuntimeError("cudnn_flex: a callback of a graph was called after the graph was built")
        return self._function(*arguments)

    def cut(self) -> None:
        self._function = None


_lowering = new_lock()


class Graph(cudnn.pygraph):
    """A graph, whose callbacks hold it only until its links are cut.

    Attributes:
        links: the links from its callbacks to the graph to which it was lowered.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.links: list[Link] = []
        super().__init__(*arguments, **keywords)

    def _lower_to_cpp(self) -> Any:
        with _linked(self.links):
            return super()._lower_to_cpp()  # pyright: ignore


@contextlib.contextmanager
def _linked(links: list[Link]) -> Generator[None]:
    module: Any = importlib.import_module("cudnn._pygraph")
    thread = threading.get_ident()
    with _lowering:
        wrap = getattr(module, "_wrap_callback", None)
        if wrap is None:
            yield
            return

        def linked(function: Any, lower: Callable[..., Any]) -> Any:
            if threading.get_ident() == thread:
                lower = Link(lower)
                links.append(lower)
            return wrap(function, lower)

        module._wrap_callback = linked
        try:
            yield
        finally:
            module._wrap_callback = wrap


# The interval kernels (cudnn.flex_attention, compiled by CuTe DSL).
INTERVALS = "cudnn.flex_attention"
LOUD = ("dispatch", "plan.builder")
WARNING = ("FlexAttentionFwd", "FlexAttentionBwd")  # loggers


# Note [What the frontend prints]. Frontend 1.32 prints a line for each interval kernel that it compiles, and warns that
# its classes are experimental; it has no switch. A program's output is its own, so for as long as we have kernels
# compiled, in our thread alone, the modules that do so get a `print` that logs, and their loggers a filter. It may go
# when the frontend logs by itself; there is no issue upstream yet.
# Note [One thread at a time]. Two threads that compile at once in CuTe DSL 4.8 fail ("An MLIR function requires a
# Location"), or end the process. It may go when the compiler has no state that threads share.
@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Has this thread alone compile kernels, and logs what the frontend prints in it."""
    modules: list[Any] = [importlib.import_module(f"{INTERVALS}.{name}") for name in LOUD]
    with _compiler:
        _compiling.append(threading.get_ident())
        for module in modules:
            module.print = _logged
        for name in WARNING:
            logging.getLogger(name).addFilter(_is_of_others)
        try:
            yield
        finally:
            _compiling.pop()
            for module in () if _compiling else modules:
                del module.print
            for name in () if _compiling else WARNING:
                logging.getLogger(name).removeFilter(_is_of_others)


def _logged(*what: Any, **how: Any) -> None:
    if threading.get_ident() in _compiling:
        log.debug("%s", " ".join(map(str, what)))
    else:
        print(*what, **how)


def _is_of_others(record: logging.LogRecord) -> bool:
    """Whether a record is of another thread; ours are logged here."""
    if threading.get_ident() not in _compiling:
        return True
    log.debug("%s", record.getMessage())
    return False


_compiler = new_reentrant_lock()
_compiling: list[int] = []  # the thread, as often as it is in `quiet`


# Note [Where interval kernels are kept]. Compiling one takes seconds. Frontend 1.32 keeps them in a folder if
# variables of the environment say so when it is imported; the environment belongs to the user and to processes that
# the user starts. So each cache of the frontend that is in memory alone is replaced, once, by one of the frontend's own
# class for a folder. It may go when a folder can be passed; there is no issue upstream yet. Without these names kernels
# are not kept.
def keep_kernels(folder: Path) -> None:
    """Makes the frontend keep the interval kernels that it compiles in a folder, unless it already does."""
    caches: Any = importlib.import_module(f"{INTERVALS}.runtime.compile_cache")
    if getattr(caches, "CUTE_DSL_CACHE_ENABLED", True):  # the user says where
        return
    try:
        memory, persistent = caches.JITCache, caches.JITPersistentCache
        root = folder / caches._compute_source_fingerprint()
        for module in (importlib.import_module(f"{INTERVALS}.{name}") for name in LOUD):
            for owner, attribute, name in _caches_of(module, memory):
                setattr(owner, attribute, persistent(root / name))
    except (AttributeError, OSError, TypeError) as error:
        log.debug("cudnn_flex: interval kernels are not kept: %s: %s", type(error).__name__, error)


def _caches_of(module: Any, memory: type) -> list[tuple[Any, str, str]]:
    """Each cache that is in memory alone: the object that has it, the attribute, and a name for it."""
    names = list(vars(module).items())
    found = [(module, name, name.strip("_").lower()) for name, value in names if type(value) is memory]
    functions = [(name, value) for name, value in names if callable(value)]
    kept = [(value, name) for name, value in functions if type(getattr(value, "compile_cache", None)) is memory]
    return [*found, *((function, "compile_cache", name.strip("_").lower()) for function, name in kept)]


# Note [Plans of fake tensors]. FlexAttentionFwd and FlexAttentionBwd take a mask's plan, and read types and sizes
# of it. Frontend 1.32 makes a plan of fake tensors without a device, but it compiles the stages that list tiles,
# too, and it writes a number, which needs a device's guard. tiler.py has those stages compiled that we run. So for as
# long as such a plan is made, in our thread alone, these functions do nothing of that. It may go when a kernel can be
# compiled without a plan.
INSTEAD: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        ("_compile_classify", "_compile_materialize", "_compile_k2q_count", "_compile_k2q_materialize"), lambda *_: None
    ),
    "_exclusive_offsets": lambda counts: counts.new_empty(counts.numel() + 1),
}  # fmt: skip


@contextlib.contextmanager
def without_stages() -> Generator[None]:
    """Makes plans of fake tensors without the stages that list tiles. Only one thread may be in here, as in `quiet`."""
    builder, thread = tile_builder(), threading.get_ident()
    before: dict[str, Any] = {name: getattr(builder, name) for name in INSTEAD if hasattr(builder, name)}

    def replaced(name: str) -> Callable[..., Any]:
        return lambda *given: (INSTEAD if threading.get_ident() == thread else before)[name](*given)

    try:
        for name in before:
            setattr(builder, name, replaced(name))
        yield
    finally:
        for name, function in before.items():
            setattr(builder, name, function)


def compiled_kernel(compiler: Any) -> Any:
    """The kernel that FlexAttentionFwd or FlexAttentionBwd compiled. Their own call checks everything at each launch.

    Raises AttributeError where it is missing: then there is no plan by tiles.
    """
    return compiler._compiled_kernel


def tile_builder() -> Any:
    """The module whose functions compile the stages that list tiles; engine/tiles/tiler.py names them.

    Raises ImportError or AttributeError where it is missing: then there is no plan by tiles.
    """
    return importlib.import_module(f"{INTERVALS}.plan.builder")


def compile_without_a_device(architecture: int) -> None:
    """Has this process, which sees no device, compile interval kernels for an architecture, such as 90.

    Two variables of the environment say the same to the rest of the compiler (engine/tiles/ahead.py).
    """
    validation: Any = importlib.import_module(f"{INTERVALS}.plan.validation")
    validation.get_device_arch = lambda _: architecture


def backward_topology(config: Any) -> Any:
    """The tiles of the backward's stage."""
    return tile_builder()._ResolvedSm90BwdTopologyConfig(config)


NAMES = (
    "_pygraph._wrap_callback", "_pygraph.pygraph._lower_to_cpp", "_pygraph.pygraph._materialize_backend_plan",
    "_pybind_module.backend_graph._execute_with_raw_ptrs",
    "_pybind_module.backend_graph._prepare_variant_pack_template",
    "_pybind_module.backend_graph._get_variant_pack_uids_sorted",
)  # fmt: skip


def missing() -> list[str]:
    """The names for graphs that this frontend lacks."""
    return [name for name in NAMES if not _there(name)]


def _there(name: str) -> bool:
    try:
        functools.reduce(getattr, name.split("."), cudnn)
        return True
    except AttributeError:
        return False
