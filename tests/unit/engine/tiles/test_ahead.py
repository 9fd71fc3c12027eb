"""Kernels by tile lists are compiled ahead: the very ones that plans ask for, in processes that cost nothing else."""

import os
import pickle
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from cudnn_flex_compile import settings
from cudnn_flex_compile.engine import frontend
from cudnn_flex_compile.engine.problem import FORWARD, Problem, TensorSpec, out_spec
from cudnn_flex_compile.engine.tiles import ahead
from cudnn_flex_compile.engine.tiles.edge_mask import EDGE_PROGRAM
from cudnn_flex_compile.engine.tiles.frontend import kernels_missing
from cudnn_flex_compile.engine.tiles.kernels import compiled_backward, compiled_forward
from cudnn_flex_compile.engine.tiles.tile_list import Room, geometry_of
from cudnn_flex_compile.engine.tiles.tiler import Tiler
from cudnn_flex_compile.engine.tiles.units import READERS, STAGES, units_of
from cudnn_flex_compile.scoremod import ir

pytestmark = pytest.mark.any_torch
ROOT = Path(__file__).parents[4]
compiled = pytest.mark.skipif(kernels_missing() is not None, reason=f"no kernels by tile lists: {kernels_missing()}")
DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))


def problem(
    batch=2, heads=4, kv_heads=2, lengths=(300, 500), dims=(64, 64), dtype=torch.bfloat16, turned=False, **more
):  # fmt: skip
    """A forward. `turned` tensors lie as [B, S, H, D]."""

    def spec(heads, length, dim):
        inner = (length, heads) if turned else (heads, length)
        found = torch.empty(batch, *inner, dim, dtype=dtype, device="meta")
        return TensorSpec.of(found.transpose(1, 2) if turned else found)

    query, key = spec(heads, lengths[0], dims[0]), spec(kv_heads, lengths[1], dims[0])
    value = spec(kv_heads, lengths[1], dims[1])
    given = {"program": EDGE_PROGRAM, "operands": (), "scale": 0.1, "device": 0, "tiled": 1, **more}
    return Problem(direction=FORWARD, query=query, key=key, value=value, out=out_spec(query, value), **given)


def generated(seed):
    """The problems of one call: its forward, and in training its backwards."""
    pick = random.Random(seed)
    heads, ratio = pick.choice((1, 2, 3, 4, 8)), pick.choice((1, 1, 2, 4))
    dims, training = pick.choice(DIMS), pick.random() < 0.7
    ratio = 1 if dims == (192, 128) else ratio  # backwards of other calls are refused
    found = problem(
        pick.choice((1, 2, 3)), heads * ratio, heads, (pick.choice((1, 17, 300)), pick.choice((1, 500, 1000))), dims,
        pick.choice((torch.bfloat16, torch.float16)), pick.random() < 0.4, stats=training or pick.random() < 0.5,
        tiled=heads * ratio if pick.random() < 0.3 else 1, replay=pick.random() < 0.5,
        deterministic=dims != (256, 256) and pick.random() < 0.2,
    )  # fmt: skip
    return [found, *([found.backward(lse) for lse in (False, True)] if training else [])]


class Asked(dict):
    """A cache of kernels that notes the keys for which it is asked, as the frontend's cache in a folder writes them."""

    def __init__(self, name, asked):
        super().__init__()
        self.name, self.asked = name, asked

    def __contains__(self, key):
        self.asked.add((self.name, pickle.dumps(key)))
        return super().__contains__(key)


@pytest.fixture
def asked(monkeypatch):
    """The keys of all kernels that are asked for. Nothing is compiled."""
    from cudnn.flex_attention import dispatch
    from cudnn.flex_attention.plan import builder, validation
    from cudnn.flex_attention.runtime import compile_cache
    from cutlass import cute

    keys = set()
    for module in (dispatch, builder):
        for kind in (compile_cache.JITCache, compile_cache.JITPersistentCache):
            for owner, attribute, name in frontend._caches_of(module, kind):
                monkeypatch.setattr(owner, attribute, Asked(name, keys))
    monkeypatch.setattr(validation, "get_device_arch", lambda _: 90)
    monkeypatch.setattr(dispatch, "_get_device_arch", lambda: 90)
    monkeypatch.setattr(builder, "_get_plan_builder_arch", lambda _: 90)
    monkeypatch.setattr(cute, "compile", lambda *_, **__: lambda *_: None)
    return keys


def table_of(problem, width=3):
    g = geometry_of(problem, training=True)
    return torch.full((g.mask_heads, width, g.batch * g.rows), g.columns, dtype=torch.int32)


def compile_as_plans_do(problem):
    """Compiles, or asks for, the kernels of a plan and of its lists."""
    training = problem.direction != FORWARD
    Tiler(geometry_of(problem, training)).within(table_of(problem), Room(1, 1, 1, 1))
    with frontend.quiet():
        (compiled_backward if training else compiled_forward)(problem)


@compiled
def test_plans_ask_for_the_kernels_that_processes_compile(asked):
    from cudnn_flex_compile.engine.tiles.ahead_process import compile_all

    of_unit = {}
    for seed in range(120):
        problems = generated(seed)
        by_processes = set()
        for unit, given in units_of(problems).items():
            asked.clear()
            compile_all(unit.part, pickle.loads(pickle.dumps(given)))
            by_processes |= asked
            training = len(problems) > 1
            assert of_unit.setdefault((*unit, training), set(asked)) == asked, (seed, unit)
        asked.clear()
        for each in problems:
            compile_as_plans_do(each)
        assert asked == by_processes, seed
    assert len(of_unit) > 80


@compiled
def test_nothing_is_compiled_twice_or_for_nothing(asked):
    """Neither stages that no list needs, nor what another process compiles."""
    from cudnn_flex_compile.engine.tiles.ahead_process import compile_all

    forward = problem()
    total = []
    for unit, given in units_of([forward, forward.backward()]).items():
        asked.clear()
        compile_all(unit.part, given)
        total += asked
    names = [name.removeprefix("arbitrary_plan_") for name, _ in total]
    assert len(total) == len(set(total)) == 9, names
    assert not any("init" in name or "schedule" in name or "scan" in name for name in names), names


@compiled
@pytest.mark.parametrize("strides", [(1, 1, 4), (7, 1, 3), (3, 1, 1), (0, 1, 0)], ids=str)
def test_lists_of_one_row_have_the_strides_of_their_shape(asked, strides):
    """A table of one row has any stride there, and the compiler looks at it."""
    one = problem(batch=1, lengths=(1, 1)).backward()
    tiler, table = Tiler(geometry_of(one, training=True)), torch.ones(64, dtype=torch.int32)
    table = table.as_strided((1, 3, 1), strides)
    assert tiler.draft(table, Room(1, 1, 1, 1)).table.stride() == (3, 1, 1)
    tiler.within(table, Room(1, 1, 1, 1))
    assert len(asked) == 5


@compiled
@pytest.mark.parametrize("turned", [False, True])
def test_calls_of_one_row_compile(asked, turned):
    found = []
    for lengths in ((1, 1), (1, 300), (300, 1), (300, 500)):
        asked.clear()
        one = problem(batch=1, lengths=lengths, turned=turned)
        for each in (one, one.backward(), one.backward(True)):
            compile_as_plans_do(each)
        found.append(set(asked))
    assert found[0] == found[1] == found[2] == found[3]


@pytest.fixture
def begun(monkeypatch, tmp_path):
    """Processes may start, with a folder of their own; none is left."""
    monkeypatch.setenv("CUDNN_FLEX_CACHE", "1")
    monkeypatch.setenv("CUDNN_FLEX_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    settings.forget()
    monkeypatch.setattr(ahead, "_cores", lambda: 8)
    monkeypatch.setattr(ahead, "LIMIT", 300.0)  # other tests take the cores, too
    yield ahead._begun
    ahead.end()


SECOND = """
import pickle, sys
from cutlass import cute
from cudnn_flex_compile.engine.tiles import ahead_process, frontend

assert frontend.kernels_missing() is None
cute.compile = lambda *_, **__: sys.exit("a kernel is compiled")
ahead_process.compile_without_a_device(90)
for unit, problems in pickle.load(sys.stdin.buffer).items():
    ahead_process.compile_all(unit[0], problems)
"""


@compiled
def test_a_second_process_compiles_none(begun, tmp_path):
    forward = problem(heads=4, kv_heads=2)
    problems = [forward, forward.backward(), forward.backward(lse_gradient=True)]
    ahead.begin(problems)
    ahead.begin(problems)
    assert [unit.part for unit in begun] == [STAGES, READERS] * 2
    for unit in list(begun):
        with ahead.awaited(unit):
            assert begun[unit].process.returncode == 0
    environment = {**os.environ, **ahead.SEEN}
    command, given = [sys.executable, "-c", SECOND], pickle.dumps(units_of(problems))
    second = subprocess.run(command, input=given, env=environment, capture_output=True, check=False)
    assert second.returncode == 0, second.stderr.decode()
    assert not second.stderr, second.stderr.decode()
    begun.clear()
    ahead.begin(problems)
    assert not begun, "a later process starts none"


def stand_in(monkeypatch, program):
    monkeypatch.setattr(ahead, "COMMAND", (sys.executable, "-c", program))


def units(begun):
    ahead.begin([problem()])
    return list(begun)


def test_none_starts_without_a_folder_or_cores(begun, monkeypatch):
    stand_in(monkeypatch, "")
    with monkeypatch.context() as few:
        few.setattr(ahead, "_cores", lambda: ahead.LEAST_CORES - 1)
        assert not units(begun)
    with monkeypatch.context() as off:
        off.setenv("CUDNN_FLEX_CACHE", "0")
        settings.forget()
        assert not units(begun)
    settings.forget()
    assert len(units(begun)) == 2


@pytest.mark.parametrize("command", [("/no/such/program",), (sys.executable, "-c", "import sys; sys.exit(3)")])
def test_a_process_that_fails_costs_nothing(begun, monkeypatch, command, capfd):
    monkeypatch.setattr(ahead, "COMMAND", command)
    for unit in units(begun) or units_of([problem()]):
        with ahead.awaited(unit):
            pass
    assert capfd.readouterr() == ("", "")


def test_a_process_that_takes_too_long_is_ended(begun, monkeypatch):
    stand_in(monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr(ahead, "LIMIT", 0.5)
    start = time.monotonic()
    for unit in units(begun):
        with ahead.awaited(unit):
            assert begun[unit].process.returncode == -9
    assert time.monotonic() - start < 10


def test_one_process_of_a_machine_compiles(begun, monkeypatch):
    """Others wait for its end, and find the kernels then."""
    stand_in(monkeypatch, "import sys, time; sys.stdin.buffer.read(1); time.sleep(0.7)")
    first = {unit: begun[unit] for unit in units(begun)}
    begun.clear()  # as in another process
    mine, start = units(begun), time.monotonic()
    assert [begun[unit].process for unit in mine] == [None, None]
    with ahead.awaited(mine[0]):
        assert time.monotonic() - start > 0.1
        assert not begun[mine[0]].running()
    for work in first.values():
        work.wait()


def test_as_many_processes_run_as_there_are_cores(begun, monkeypatch):
    stand_in(monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr(ahead, "_cores", lambda: 5)
    ahead.begin([problem(heads=2 * n) for n in range(1, 6)])
    assert len(begun) == 5


@compiled
def test_a_process_ends_with_its_caller(tmp_path):
    """Its input is closed then. It prints nothing before."""
    environment = {**os.environ, **ahead.SEEN, "CUDNN_FLEX_CACHE": "1", "CUDNN_FLEX_CACHE_DIR": str(tmp_path)}
    process = subprocess.Popen(ahead.COMMAND, stdin=subprocess.PIPE, env=environment, cwd=ROOT)
    timer = threading.Timer(30, process.kill)
    timer.start()
    process.stdin.write(pickle.dumps((STAGES, [problem()], tmp_path / "done")))
    process.stdin.close()
    assert process.wait() == 1
    timer.cancel()
    assert not (tmp_path / "done").exists()


def test_units_differ_by_what_kernels_are_compiled_for():
    """It is no length, and no program."""
    one, other = problem(), problem(lengths=(1000, 2000), batch=5, replay=False, program=ir.program())
    assert units_of([one]).keys() == units_of([other]).keys()
    for kind in (problem(dims=(128, 128)), problem(stats=False), problem(tiled=4), problem(dtype=torch.float16)):
        assert units_of([kind]).keys() != units_of([one]).keys()
