"""The frontend has the private names that the engine uses; what is done to it is undone, and done to nobody else."""

import builtins
import gc
import logging
import sys
import threading
import time
import weakref
from types import ModuleType, SimpleNamespace

import cudnn
import cudnn._pygraph as pygraph
import pytest

from cudnn_flex_compile.engine import frontend
from cudnn_flex_compile.engine.frontend import Graph, Link, keep_kernels, quiet


def test_the_frontend_has_them_all():
    print(f"nvidia-cudnn-frontend {cudnn.__version__}; missing:", *frontend.missing())
    assert not frontend.missing()


def test_a_link_is_cut():
    link = Link(lambda x: x + 1)
    assert link(1) == 2
    link.cut()
    with pytest.raises(RuntimeError, match="after the graph was built"):
        link(1)


class Lowered:
    """Holds its callback, as the C++ graph does."""


@pytest.fixture
def lowered(monkeypatch):
    """What graphs were lowered to; and a callback that was wrapped in another thread meanwhile."""
    found, others = [], []

    def lower(graph):
        made = Lowered()
        made.callback = pygraph._wrap_callback(lambda g, score: score, lambda tensor: (made, tensor))
        found.append(weakref.ref(made))
        thread = threading.Thread(target=lambda: others.append(pygraph._wrap_callback(str, lambda tensor: tensor)))
        thread.start()
        thread.join()
        return made

    monkeypatch.setattr(cudnn.pygraph, "_lower_to_cpp", lower)
    return found, others


def test_a_callback_leads_to_its_graph_until_the_link_is_cut(lowered):
    found, others = lowered
    wrap = pygraph._wrap_callback
    graph = Graph()
    made = graph._lower_to_cpp()
    assert pygraph._wrap_callback is wrap
    assert len(graph.links) == len(others) == 1, "another thread's callbacks are its own"
    assert graph.links[0]("tensor") == (made, "tensor")
    graph.links[0].cut()
    gc.disable()
    try:
        del made
        assert found[0]() is None, "no cycle is left"
    finally:
        gc.enable()


def test_the_frontend_is_as_it_was_after_a_graph_that_is_refused(monkeypatch):
    def refuse(graph):
        assert pygraph._wrap_callback is not wrap
        raise RuntimeError("refused")

    wrap = pygraph._wrap_callback
    monkeypatch.setattr(cudnn.pygraph, "_lower_to_cpp", refuse)
    with pytest.raises(RuntimeError, match="refused"):
        Graph()._lower_to_cpp()
    assert pygraph._wrap_callback is wrap


def test_without_the_name_a_graph_is_lowered_as_it_is(lowered, monkeypatch):
    monkeypatch.setattr(cudnn.pygraph, "_lower_to_cpp", lambda graph: "lowered")
    monkeypatch.delattr(pygraph, "_wrap_callback")
    assert Graph()._lower_to_cpp() == "lowered"
    assert not hasattr(pygraph, "_wrap_callback")


SOURCE = """
def compiles():
    print("Compiled", "a kernel")
"""


@pytest.fixture
def interval_modules(monkeypatch):
    """Stand-ins for the modules of cudnn.flex_attention."""
    modules = {name: ModuleType(f"{frontend.INTERVALS}.{name}") for name in (*frontend.LOUD, "plan", "runtime")}
    for module in modules.values():
        exec(SOURCE, vars(module))
    for name, module in {"": ModuleType(frontend.INTERVALS), **modules}.items():
        monkeypatch.setitem(sys.modules, f"{frontend.INTERVALS}.{name}".rstrip("."), module)
    return [modules[name] for name in frontend.LOUD]


def test_what_the_frontend_prints_for_us_is_logged(interval_modules, capsys, caplog):
    module = interval_modules[0]
    caplog.set_level("DEBUG", "cudnn_flex_compile")
    with quiet():
        with quiet():
            module.compiles()
        module.compiles()
        assert capsys.readouterr().out == ""
        thread = threading.Thread(target=module.compiles)
        thread.start()
        thread.join()
        assert capsys.readouterr().out == "Compiled a kernel\n", "a user's own compilation prints as before"
    assert [record.getMessage() for record in caplog.records] == ["Compiled a kernel"] * 2
    module.compiles()
    assert capsys.readouterr().out == "Compiled a kernel\n"
    assert not any("print" in vars(m) for m in interval_modules)
    assert print is builtins.print


@pytest.mark.usefixtures("interval_modules")
def test_what_the_frontend_warns_us_of_is_logged(caplog):
    caplog.set_level("DEBUG", "cudnn_flex_compile")
    loggers = [logging.getLogger(name) for name in frontend.WARNING]

    def warn(who):
        for logger in loggers:
            logger.warning("%s is experimental", who)

    with quiet(), quiet():
        warn("ours")
        thread = threading.Thread(target=warn, args=("a user's",))
        thread.start()
        thread.join()
    warn("another")
    found = [(record.levelname, record.getMessage().split(" is ")[0]) for record in caplog.records]
    assert found == [("DEBUG", "ours")] * 2 + [("WARNING", "a user's")] * 2 + [("WARNING", "another")] * 2


def test_one_thread_compiles_at_a_time(interval_modules):
    """The compiler fails where two do."""
    inside, most = [], []

    def compile_one():
        with quiet(), quiet():
            inside.append(0)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=compile_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


class Memory(dict):
    pass


class Persistent(Memory):
    def __init__(self, path):
        super().__init__()
        self.path = path


@pytest.fixture
def caches(interval_modules, monkeypatch):
    names = {"JITCache": Memory, "JITPersistentCache": Persistent, "CUTE_DSL_CACHE_ENABLED": False}
    module = SimpleNamespace(**names, _compute_source_fingerprint=lambda: "digest")
    monkeypatch.setitem(sys.modules, f"{frontend.INTERVALS}.runtime.compile_cache", module)
    dispatch, builder = interval_modules
    dispatch.compiles.compile_cache = Memory()
    builder._CLASSIFY_CACHE = Memory()
    return module


def paths_of(interval_modules):
    dispatch, builder = interval_modules
    return [getattr(c, "path", None) for c in (dispatch.compiles.compile_cache, builder._CLASSIFY_CACHE)]


def test_kernels_are_kept_in_a_folder(caches, interval_modules, tmp_path):
    keep_kernels(tmp_path)
    root = tmp_path / "digest"
    assert paths_of(interval_modules) == [root / "compiles", root / "classify_cache"]
    before = interval_modules[1]._CLASSIFY_CACHE
    keep_kernels(tmp_path / "another")
    assert interval_modules[1]._CLASSIFY_CACHE is before


def test_where_the_user_says_where_they_stay(caches, interval_modules, tmp_path):
    caches.CUTE_DSL_CACHE_ENABLED = True
    keep_kernels(tmp_path)
    assert paths_of(interval_modules) == [None, None]


def test_without_the_names_they_are_not_kept(caches, interval_modules, tmp_path):
    del caches.JITPersistentCache
    keep_kernels(tmp_path)
    assert paths_of(interval_modules) == [None, None]
