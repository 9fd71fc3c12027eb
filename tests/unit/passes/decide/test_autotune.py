"""Calls that are measured: who decides, what is remembered, and what a time depends on. Times are made up."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cudnn_flex_compile.engine.find_plan import find_plan
from cudnn_flex_compile.engine.key import forward_of, problem_of
from cudnn_flex_compile.engine.launch import timing
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.kernels import inductor_timer
from cudnn_flex_compile.kernels.inductor_timer import Contest
from cudnn_flex_compile.passes.decide import autotune
from cudnn_flex_compile.passes.decide.autotune import HOST, Times
from cudnn_flex_compile.reasons import Code
from tests.support import stand_in
from tests.support.stand_in import call

BLOCKS = (torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 2, dtype=torch.int32), None, None)


@pytest.mark.parametrize(
    ("ours", "stock", "kept"),
    [
        ((1.0, 2.0), (1.0, 2.0), False),
        ((1.5, 1.6), (1.0, 2.0), True),
        ((0.5, 2.4), (1.0, 2.0), False),
        ((0.001, 0.001), (0.03, 0.04), True),  # the host takes longer
        ((0.001, 0.001), HOST, False),
        ((1.0,), (0.9,), True),
        ((0.001,), (HOST[0],), False),
    ],
)
def test_the_pair_of_directions_decides(ours, stock, kept):
    reason = Times(ours, stock).reason
    assert (reason is not None) == kept
    assert reason is None or reason.code is Code.SLOWER


@pytest.fixture
def target(monkeypatch, tmp_path):
    """A call whose plans were found; each side takes what `target.clock` says, and counts how often it was timed."""
    stand_in.install(monkeypatch, tmp_path)
    clock = SimpleNamespace(ours=[0.5, 1.0], stock=(1.0, 1.5), timed=[])
    backward = call(backward=True)
    forward = forward_of(backward)
    for key in (forward, backward):
        find_plan(key)

    def ours(contenders):
        clock.timed.append("ours")
        return clock.ours[: len(contenders)]

    def stock(contest):
        clock.timed.append("stock")
        return clock.stock

    monkeypatch.setattr(timing, "milliseconds", ours)
    monkeypatch.setattr(autotune, "milliseconds", stock)
    monkeypatch.setattr(autotune, "run_clean", lambda function, device: function())
    monkeypatch.setattr(autotune, "environment", lambda device: stand_in.ENVIRONMENT)
    monkeypatch.setattr(autotune, "forward_call", lambda target, running, device: forward)
    monkeypatch.setattr(autotune, "backward_call", lambda given: backward)
    query = SimpleNamespace(device=torch.device("cuda", 0))
    called = SimpleNamespace(query=query, blocks=(), block_sizes=(128, 128))
    return SimpleNamespace(
        call=called, training=True, running=None, program=None, hoisted=(), real={}, fingerprint="f", clock=clock,
        lse_gradient=False,
    )  # fmt: skip


def test_measured_once_in_all_processes(target):
    assert autotune.times_of(target) == autotune.times_of(target) == Times((0.5, 1.0), (1.0, 1.5))
    engine.times.clear()
    assert autotune.times_of(target) == Times((0.5, 1.0), (1.0, 1.5))
    assert target.clock.timed == ["stock", "ours"]


def test_without_gradients_the_forward_alone(target):
    target.training, target.clock.stock = False, (0.25,)
    assert autotune.times_of(target).reason.code is Code.SLOWER


@pytest.mark.parametrize("change", ["device", "functions", "blocks", "triton"])
def test_what_times_depend_on(target, monkeypatch, change):
    autotune.times_of(target)
    if change == "device":
        monkeypatch.setattr(autotune, "environment", lambda device: ("another",))
    if change == "functions":
        target.fingerprint = "g"
    if change == "blocks":
        target.call.blocks, target.real = ("a", "b", None, None), {"a": BLOCKS[0], "b": BLOCKS[1]}
    if change == "triton":
        monkeypatch.setattr(autotune, "_triton", lambda: "another")
    autotune.times_of(target)
    assert target.clock.timed == ["stock", "ours"] * 2


def test_what_cannot_be_measured_is_nobodys(target, monkeypatch):
    target.clock.stock = None
    assert autotune.times_of(target) is None
    target.clock.stock = (1.0, 1.5)

    def short(contenders):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(timing, "milliseconds", short)
        assert autotune.times_of(target) is None
    assert autotune.times_of(target) is not None, "neither was remembered"


def test_what_is_measured():
    def of(device="cuda", blocks=(), real=(), lse_gradient=False, compact=None):
        query = SimpleNamespace(device=torch.device(device))
        return SimpleNamespace(
            call=SimpleNamespace(query=query, blocks=blocks), real=dict(real), lse_gradient=lse_gradient,
            compact=compact,
        )  # fmt: skip

    assert autotune.measurable(of())
    assert autotune.measurable(of(blocks=("a", "b", None, None), real={"a": BLOCKS[0], "b": BLOCKS[1]}))
    assert not autotune.measurable(of(blocks=("a", "b", None, None)))
    assert not autotune.measurable(of(device="cpu"))
    assert not autotune.measurable(of(lse_gradient=True))
    assert not autotune.measurable(of(compact="permuted keys"))


@pytest.mark.parametrize("blocks", [(), BLOCKS], ids=["no BlockMask", "a BlockMask"])
def test_inductor_computes_the_call(blocks):
    """In this process, and on the CPU, which has the forward alone."""
    problem = problem_of(call())
    found = inductor_timer.contenders(Contest(problem, False, blocks, (128, 128)), torch.device("cpu"))
    assert len(found) == 1
    out = found[0]()
    assert out.shape == problem.out.shape
    assert torch.isfinite(out).all()


def test_a_process_that_fails(caplog):
    """As it does without a GPU: nobody is the wiser, and a line says why."""
    assert inductor_timer.milliseconds(Contest(problem_of(call()), False, (), (128, 128))) is None
    assert "could not be timed" in caplog.text


def test_stored_times_are_exact(target):
    target.clock.ours = [0.1 + 0.2, 1 / 3]
    autotune.times_of(target)
    engine.times.clear()
    assert autotune.times_of(target).ours == (0.1 + 0.2, 1 / 3)


def test_another_problem_is_another_time(target):
    found = [find_plan(call(backward=True))]
    contest = Contest(found[0].plan.problem.forward(), True, (), (128, 128))
    other = replace(contest, problem=replace(contest.problem, scale=0.5))
    assert autotune._key(found, contest, "f") != autotune._key(found, other, "f")
