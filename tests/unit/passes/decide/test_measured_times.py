"""Contenders that are measured: which, how long, what is remembered, what becomes of failures. Times are made up."""

import contextlib
import functools
import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from cudnn_flex_compile.engine.find_plan import find_plan
from cudnn_flex_compile.engine.key import forward_of, problem_of
from cudnn_flex_compile.engine.launch import timing
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.kernels import inductor_timer
from cudnn_flex_compile.kernels.inductor_timer import Contest
from cudnn_flex_compile.passes.decide import chooser, cost_inputs, cost_model, measured_times
from cudnn_flex_compile.passes.decide.chooser import STOCK, choose
from cudnn_flex_compile.passes.decide.cost_inputs import Blocks
from cudnn_flex_compile.passes.decide.cost_model import Estimate
from cudnn_flex_compile.passes.decide.measured_times import Budget, Measuring, measurable, several_ranks
from tests.support import stand_in
from tests.support.stand_in import call
from tests.unit.passes.decide.conftest import table
from tests.unit.passes.decide.test_chooser import facts

GRAPHS, LISTS = (), ("forward", "backward")
BLOCKS = (torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 2, dtype=torch.int32), None, None)
SECONDS = {"start": 1.0, "plans": 3.0, "ours": 0.5, "stock": 6.0}


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A device whose times a test sets. It says what was timed, and how long that took."""
    stand_in.install(monkeypatch, tmp_path)
    forward, backward = forward_of(call(backward=True)), call(backward=True)
    for key in (forward, backward):
        find_plan(key)
    found = SimpleNamespace(
        now=0.0, stock=(1.0, 1.5), ours=[0.5, 1.0], timed=[], patience=[], fails=None, free=2**40, ended=0,
    )  # fmt: skip

    def passes(what):
        found.now += SECONDS[what]
        if found.fails == what:
            raise RuntimeError(what)

    def milliseconds(runs):
        found.timed.append("ours")
        passes("ours")
        return found.ours[: len(runs)]

    @contextlib.contextmanager
    def compiling(contest):
        passes("start")

        def stock(seconds):
            found.timed.append("inductor")
            found.patience.append(seconds)
            passes("stock")
            if seconds < SECONDS["stock"]:
                raise TimeoutError
            return found.stock[: 1 + contest.training]

        try:
            yield stock
        finally:
            found.ended += 1

    monkeypatch.setattr(timing, "milliseconds", milliseconds)
    monkeypatch.setattr(measured_times, "compiling", compiling)
    monkeypatch.setattr(measured_times, "clock", lambda: found.now)
    monkeypatch.setattr(measured_times, "run_clean", lambda function, device: function())
    monkeypatch.setattr(measured_times, "environment", lambda device: stand_in.ENVIRONMENT)
    monkeypatch.setattr(measured_times, "forward_call", lambda target, running, device: forward)
    monkeypatch.setattr(measured_times, "backward_call", lambda given, tiled, lse_gradient: backward)
    monkeypatch.setattr(measured_times, "several_ranks", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (found.free, 2**40))

    def ready(way):
        passes("plans")
        return True

    found.candidates = {GRAPHS: candidate(), LISTS: candidate(tiled=LISTS)}
    found.measuring = lambda seconds=60, blocks=None: Measuring(
        found.candidates, ready, lambda way: None, blocks, Budget(seconds)
    )
    return found


def candidate(**how):
    query = SimpleNamespace(device=torch.device("cuda", 0))
    called = SimpleNamespace(query=query, blocks=(), block_sizes=(128, 128))
    given = {"tiled": (), "training": True, "lse_gradient": False, "fingerprint": "f", "policy": "", "hoisted": ()}
    return SimpleNamespace(call=called, running=None, program=None, mask_heads=1, real={}, **given | how)


def test_ours_and_inductors(device):
    measuring = device.measuring()
    assert measuring([GRAPHS, STOCK]) == {GRAPHS: (0.5, 1.0), STOCK: (1.0, 1.5)}
    assert device.timed == ["ours", "inductor"]
    assert measuring.budget.left == 60 - 1.0 - 0.5 - 6.0, "the plans would have been found in any case"
    assert device.ended == 1


def test_without_gradients_the_forward_alone(device):
    device.candidates[GRAPHS].training = False
    assert device.measuring()([GRAPHS, STOCK]) == {GRAPHS: (0.5,), STOCK: (1.0,)}


def test_several_of_ours(device):
    device.ours = [0.5, 1.0, 0.25, 2.0]
    assert device.measuring()([GRAPHS, LISTS]) == {GRAPHS: (0.5, 1.0), LISTS: (0.25, 2.0)}
    assert device.timed == ["ours"]


def forget():
    engine.times.clear()


def test_a_second_process_measures_nothing(device):
    expected = device.measuring()([GRAPHS, STOCK])
    forget()
    second = device.measuring()
    assert second([GRAPHS, STOCK]) == expected
    assert second([GRAPHS, STOCK]) == expected
    assert device.timed == ["ours", "inductor"]
    assert second.budget.left == 60


def test_what_is_stored_is_exact(device):
    device.ours = [0.1 + 0.2, 1 / 3]
    device.measuring()([GRAPHS, STOCK])
    forget()
    assert device.measuring()([GRAPHS, STOCK])[GRAPHS] == (0.1 + 0.2, 1 / 3)


@pytest.mark.parametrize("change", ["device", "functions", "blocks", "triton", "policy", "training"])
def test_what_times_depend_on(device, monkeypatch, change):
    device.measuring(blocks=Blocks(0.5, 0.1))([GRAPHS, STOCK])
    blocks = Blocks(0.5, 0.1)
    if change == "device":
        monkeypatch.setattr(measured_times, "environment", lambda device: ("another",))
    if change == "functions":
        device.candidates[GRAPHS].fingerprint = "g"
    if change == "policy":
        device.candidates[GRAPHS].policy = "autotune=True"
    if change == "training":
        device.candidates[GRAPHS].training = False
    if change == "blocks":
        blocks = Blocks(0.25, 0.1)
    if change == "triton":
        monkeypatch.setattr(measured_times, "_triton", lambda: "another")
    device.measuring(blocks=blocks)([GRAPHS, STOCK])
    assert device.timed.count("ours") == 2
    assert device.timed.count("inductor") == 1 + (change not in ("functions", "policy"))


def test_other_data_of_about_as_many_blocks_is_the_same_call(device):
    for blocks in (Blocks(0.5, 0.1), Blocks(0.51, 0.1), Blocks(0.0, 1.0), Blocks(0.0, 1.0)):
        device.measuring(blocks=blocks)([GRAPHS, STOCK])
    assert device.timed == ["ours", "inductor"] * 2


@pytest.mark.parametrize("fails", ["start", "plans", "ours", "stock"])
def test_what_fails_gives_no_times_once(device, fails):
    device.fails = fails
    found = device.measuring()([GRAPHS, STOCK])
    assert found == ({GRAPHS: (0.5, 1.0)} if fails == "stock" else {})
    assert device.ended == (fails != "start"), "the process is ended"
    now, device.fails = device.now, None
    assert device.measuring()([GRAPHS, STOCK]) == found
    assert device.now == now, "it fails once in a process"
    forget()
    assert STOCK in device.measuring()([GRAPHS, STOCK])


def test_short_memory_starts_nothing(device):
    device.free = 2**30
    assert device.measuring()([GRAPHS, STOCK]) == {}
    assert device.now == 0


def test_the_budget_is_kept(device):
    """No measurement begins without time, and none lasts longer than what is left."""
    measuring = device.measuring(5)
    assert measuring([GRAPHS, STOCK]) == {GRAPHS: (0.5, 1.0)}
    assert device.patience == [5 - 1.0 - 0.5]
    assert measuring.budget.left <= 0
    forget()
    device.candidates[GRAPHS].fingerprint = "another call of the compile"
    assert measuring([GRAPHS, STOCK]) == {}
    assert device.timed == ["ours", "inductor"]


def test_a_contender_that_comes_later_is_within_the_budget(device):
    """Times of before are not measured again, and the plans of the later one are not found for nothing."""
    measuring = device.measuring()
    first = measuring([GRAPHS, STOCK])
    left, device.ours = measuring.budget.left, [0.25, 0.75]
    assert measuring([GRAPHS, LISTS, STOCK]) == first | {LISTS: (0.25, 0.75)}
    assert device.timed == ["ours", "inductor", "ours"]
    assert measuring.budget.left == left - SECONDS["plans"] - SECONDS["ours"]


def test_other_plans_of_ours_are_found_while_there_is_time(device):
    device.ours = [0.5, 1.0]
    assert device.measuring(0.5)([GRAPHS, LISTS]) == {GRAPHS: (0.5, 1.0)}


def test_what_is_measured(monkeypatch):
    monkeypatch.setattr(measured_times, "several_ranks", lambda: False)

    def of(kind="cuda", blocks=(), real=(), hoisted=(), known=True):
        given = candidate(hoisted=hoisted)
        given.call.query.device, given.call.blocks, given.real = torch.device(kind), blocks, dict(real)
        return measurable(given, known)

    assert of()
    assert of(blocks=("a", "b", None, None), real={"a": BLOCKS[0], "b": BLOCKS[1]})
    assert not of(blocks=("a", "b", None, None))
    assert not of(known=False)
    assert not of("cpu")
    assert not of(hoisted=(SimpleNamespace(learned=True),))
    monkeypatch.setattr(measured_times, "several_ranks", lambda: True)
    assert not of()


@pytest.mark.parametrize(("size", "several"), [(None, False), ("1", False), ("", False), ("8", True)])
def test_ranks_by_the_launcher(monkeypatch, size, several):
    monkeypatch.setenv("WORLD_SIZE", size) if size is not None else monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert several_ranks() == several


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_by_their_group(monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: size)
    assert several_ranks() == (size > 1)


# What is chosen by them.


class Asked:
    """Measures as it is told, and says which contenders it was asked for."""

    def __init__(self, **times):
        names = {"graphs": GRAPHS, "lists": LISTS, "inductor": STOCK}
        self.times, self.ways = {names[name]: (ms,) for name, ms in times.items()}, []

    def __call__(self, ways):
        self.ways.append(list(ways))
        return {way: self.times[way] for way in ways if way in self.times}


@pytest.fixture
def predicted(monkeypatch):
    """Sets the predictions of the three contenders."""

    def predict(graphs, lists, stock):
        by_way = {GRAPHS: graphs, LISTS: lists}

        def ours(inputs, measured=()):
            return Estimate(measured or (by_way[inputs.tiled],), measured=bool(measured))

        monkeypatch.setattr("cudnn_flex_compile.passes.decide.chooser.ours", ours)
        monkeypatch.setattr(
            "cudnn_flex_compile.passes.decide.chooser.inductors",
            lambda inputs, measured=(): Estimate(measured or (stock,), measured=bool(measured)),
        )

    return predict


def chosen(measure, every=False, **how):
    ways = {GRAPHS: facts(**how), LISTS: facts(tiled=True, **how)}
    return choose(ways, True, measure, every)


@pytest.mark.parametrize(("times", "order"), [((1.0, 2.0, 1.4), (GRAPHS,)), ((1.4, 2.0, 1.0), ())])
def test_plain_predictions_measure_nothing(predicted, times, order):
    predicted(*times)
    measure = Asked()
    assert chosen(measure).order == order
    assert measure.ways == []


@pytest.mark.parametrize("times", [(1.0, 4.0, 1.2), (1.2, 4.0, 1.0)])
@pytest.mark.parametrize(("graphs", "order"), [(1.0, (GRAPHS,)), (3.0, ())])
def test_where_they_are_not_plain_times_decide(predicted, times, graphs, order):
    predicted(*times)
    measure = Asked(graphs=graphs, inductor=2.0)
    found = chosen(measure)
    assert measure.ways == [[GRAPHS, STOCK]]
    assert found.order == order
    assert {way: estimate.total for way, estimate in found.estimates.items()} == {GRAPHS: graphs, STOCK: 2.0}
    assert found.slower.detail.endswith("; measured here")


@pytest.mark.parametrize(
    ("lists", "order"), [(1.5, (LISTS,)), (2.0, (LISTS,)), (2.5, ()), (None, ())],
    ids=["wins", "ties", "loses", "fails"],
)  # fmt: skip
@pytest.mark.parametrize("graphs", [3.0, None], ids=["loses", "can't run"])
def test_where_the_fastest_of_ours_loses_the_next_one_is_measured(predicted, graphs, lists, order):
    predicted(1.0, 2.5, 1.2)
    known = {"graphs": graphs, "lists": lists, "inductor": 2.0}
    measure = Asked(**{name: ms for name, ms in known.items() if ms is not None})
    found = chosen(measure)
    assert measure.ways == [[GRAPHS, STOCK], [GRAPHS, LISTS, STOCK]]
    if {graphs, lists} == {None}:  # predictions decide
        assert found.order == (GRAPHS,)
    else:
        assert found.order == order
        assert all(estimate.measured for estimate in found.estimates.values())


@pytest.mark.parametrize(
    ("lists", "times"),
    [
        (2.7, {"graphs": 3.0, "inductor": 2.0}),
        (1.1, {"graphs": 2.0, "inductor": 2.0}),
        (1.1, {"graphs": 1.0, "inductor": 2.0}),
        (1.1, {"graphs": 3.0}),
    ],
    ids=["it is plainly slower", "ties are ours", "the first wins", "Inductor's kernel can't be timed"],
)
def test_where_the_next_one_is_not_measured(predicted, lists, times):
    predicted(1.0, lists, 1.2)
    measure = Asked(**times)
    chosen(measure)
    assert measure.ways == [[GRAPHS, STOCK]]


def test_two_of_ours_are_told_apart_by_the_devices_own_table(predicted):
    predicted(1.0, 1.1, 5.0)
    measure = Asked()
    assert chosen(measure).order == (GRAPHS, LISTS)
    assert measure.ways == []


def test_calls_that_take_next_to_nothing_are_not_measured(predicted):
    predicted(0.001, 0.002, 0.001)
    measure = Asked()
    assert chosen(measure).order == (GRAPHS,)
    assert measure.ways == []
    chosen(measure, every=True)
    assert measure.ways == [[GRAPHS, LISTS, STOCK]]


@pytest.mark.parametrize("every", [False, True])
def test_a_device_without_a_table_is_measured(predicted, monkeypatch, every):
    """So is any, where the option autotune asks for it."""
    foreign = SimpleNamespace(foreign=not every, device="another")
    monkeypatch.setattr(cost_inputs, "times_of", lambda device: foreign)
    predicted(1.0, 2.0, 10.0)
    measure = Asked(graphs=3.0, lists=2.0, inductor=2.5)
    found = chosen(measure, every)
    assert measure.ways == [[GRAPHS, LISTS, STOCK]]
    assert found.order == (LISTS,)


def test_a_device_without_a_table_that_was_not_measured_is_named(predicted, monkeypatch, caplog):
    foreign = SimpleNamespace(foreign=True, device="NVIDIA H200")
    monkeypatch.setattr(cost_inputs, "times_of", lambda device: foreign)
    predicted(1.0, 2.0, 0.5)
    chooser._warn_of.cache_clear()
    for _ in range(2):
        assert "by the table of NVIDIA H200, for there is none of this device" in chosen(None).slower.detail
    (record,) = caplog.records
    assert "run `cudnn-flex calibrate`" in record.getMessage()


@pytest.mark.parametrize("times", [{}, {"graphs": 9.0}, {"inductor": 0.1}])
def test_without_both_sides_predictions_decide(predicted, times):
    predicted(1.0, 2.0, 1.2)
    found = chosen(Asked(**times))
    assert found.order == (GRAPHS,)
    assert found.slower.detail.endswith("; predicted")


def test_the_time_besides_kernels_counts_where_these_were_measured(monkeypatch):
    found = table()
    monkeypatch.setattr(cost_inputs, "times_of", lambda device: found)
    inputs = facts(tiled=True, queries=16384, keys=16384, share=0.2)
    estimate = cost_model.ours(inputs, (1.0, 2.0))
    assert [name for name, _ in estimate.rest] == ["list"]
    assert estimate.total > 3.0
    assert estimate.measured


# The process that times Inductor's kernel.


def compile_eagerly(compile, function, *, options, **how):
    return compile(function, backend="aot_eager", **how)


@pytest.mark.parametrize("blocks", [(), BLOCKS], ids=["no BlockMask", "a BlockMask"])
def test_inductor_computes_the_call(blocks):
    """In this process, and on the CPU, which has the forward alone."""
    problem = problem_of(call())
    found = inductor_timer.contenders(Contest(problem, False, False, blocks, (128, 128)), torch.device("cpu"))
    assert len(found) == 1
    out = found[0]()
    assert out.shape == problem.out.shape
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("lse", [False, True])
def test_the_gradients_of_the_call(trainable, monkeypatch, lse):
    """By a backend that has them on the CPU."""
    monkeypatch.setattr(torch, "compile", functools.partial(compile_eagerly, torch.compile))
    problem = problem_of(call())
    _, backward = inductor_timer.contenders(Contest(problem, True, lse, (), (0, 0)), torch.device("cpu"))
    assert [g.shape for g in backward()] == [spec.shape for spec in (problem.query, problem.key, problem.value)]


def test_a_process_that_fails():
    """As it does without a GPU: the caller is told why, and no process is left."""
    contest = Contest(problem_of(call()), False, False, (), (0, 0))
    with inductor_timer.compiling(contest) as milliseconds, pytest.raises(RuntimeError, match=r"CUDA|cuda|NVIDIA"):
        milliseconds(120.0)


@pytest.mark.parametrize("seconds", [0.5, 10.0])
def test_a_process_that_takes_long_is_ended(monkeypatch, seconds):
    started, real = [], subprocess.Popen

    def slow(command, **how):
        started.append(real(["/bin/sh", "-c", "read go; sleep 5; echo '[1.0, 2.5]'"], **how))
        return started[-1]

    monkeypatch.setattr(inductor_timer.subprocess, "Popen", slow)
    contest = Contest(problem_of(call()), True, False, (), (0, 0))
    with inductor_timer.compiling(contest) as milliseconds:
        if seconds < 5:
            with pytest.raises(TimeoutError, match="not timed within"):
                milliseconds(seconds)
        else:
            assert milliseconds(seconds) == (1.0, 2.5)
    assert started[0].poll() is not None


def test_a_block_that_raises_ends_the_process(monkeypatch):
    started, real = [], subprocess.Popen

    def slow(command, **how):
        started.append(real(["sleep", "60"], **how))
        return started[-1]

    monkeypatch.setattr(inductor_timer.subprocess, "Popen", slow)
    with pytest.raises(KeyError), inductor_timer.compiling(Contest(problem_of(call()), True, False, (), (0, 0))):
        raise KeyError
    assert started[0].poll() is not None


def test_stored_times_are_json(device):
    device.measuring()([GRAPHS, STOCK])
    (key,) = [key for key in engine.times._entries if "inductor" in key.splitlines()]
    assert json.loads(engine.store.read(key)) == [1.0, 1.5]
