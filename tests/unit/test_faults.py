"""What goes wrong around plans stops no model: refused builds, no memory, threads, forks, a library that is missing.

Knows nothing of a GPU: plans are stand-ins (tests/gpu/test_faults.py has real ones).
"""

import gc
import logging
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cudnn
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.engine import find_plan
from cudnn_flex_compile.engine.certify import certify
from cudnn_flex_compile.engine.graph.lowering import Lowering
from cudnn_flex_compile.engine.key import backward_key, forward_key, problem_of
from cudnn_flex_compile.engine.plans import graph_plan
from cudnn_flex_compile.engine.problem import BACKWARD, TensorSpec
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.worker import any_algorithm
from cudnn_flex_compile.kernels import cuda
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.report.report import collect
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.text import text

ROOT = Path(__file__).parents[2]
PROGRAM = text(ir.program())
SHAPE = (1, 2, 16, 32)


def qkv() -> list[torch.Tensor]:
    return [torch.randn(SHAPE, dtype=torch.bfloat16) for _ in range(3)]


@dataclass
class StandIn:
    """A plan that raises when it is run."""

    problem: Any
    error: Exception
    strategy: str = "stand-in"
    runs: int = 0

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        p = self.problem
        return (p.query, p.key, p.value) if p.direction == BACKWARD else (p.out,)

    def on_harder_mask(self) -> None:
        return None

    def prepared(self, *values: Any) -> "StandIn":
        return self

    def run(self, *arguments: Any) -> None:
        self.runs += 1
        raise self.error


@pytest.fixture
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the code of CUDA run on the CPU, in the caller's thread."""
    monkeypatch.setattr(torch_private, "current_device", lambda: -1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cuda, "empty", lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype))
    monkeypatch.setattr(find_plan, "run_clean", lambda function, device: function())
    monkeypatch.setattr(find_plan, "unusable_device", lambda index: None)
    monkeypatch.setattr(find_plan, "recall", lambda *arguments: None)  # nothing is stored
    monkeypatch.setattr(find_plan, "keep", lambda *arguments: None)
    monkeypatch.setattr(cuda, "_warned", set())
    engine.reset()
    yield
    engine.reset()


# Builds that fail

ERRORS = [
    cudnn.cudnnGraphNotSupportedError("no engine"), RuntimeError("no kernel"), ValueError("a stride"),
    TypeError("incompatible function arguments"), AttributeError("no such method"), KeyError("role"),
    AssertionError("of the frontend"), NotImplementedError("a mode"), ImportError("cutlass"), OSError("libnvrtc"),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_whatever_a_build_raises_refuses_it(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(graph_plan, "_build", broken)
    problem = problem_of(forward_key(PROGRAM, *qkv(), [], 0.125, True))
    found = graph_plan.build(problem, Lowering("chained"))
    assert isinstance(found, Reason)
    assert found.code is Code.SHAPE_REFUSED
    assert str(error).strip("'") in found.detail


def test_after_a_build_that_raises_the_next_strategy_is_tried(on_the_host, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_at_first(problem: Any, lowering: Lowering) -> Any:
        if lowering.strategy == "native":
            raise TypeError("incompatible function arguments")
        return StandIn(problem, RuntimeError(), lowering.strategy)

    monkeypatch.setattr(graph_plan, "_build", broken_at_first)
    monkeypatch.setattr(certify, "certify", lambda *arguments: None)
    found = find_plan.find_plan(forward_key(PROGRAM, *qkv(), [], 0.125, True))
    assert isinstance(found, find_plan.CachedPlan)
    assert found.plan.strategy == "chained"


@pytest.mark.parametrize("where", ["build", "certify"])
def test_no_memory_for_a_plan_is_a_reason(where: str, on_the_host, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    built = no_memory if where == "build" else lambda p, lowering: StandIn(p, KeyError())
    monkeypatch.setattr(graph_plan, "_build", built)
    monkeypatch.setattr(certify, "certify", no_memory)
    found = find_plan.find_plan(forward_key(PROGRAM, *qkv(), [], 0.125, True))
    assert isinstance(found, Reason)
    assert found.code is Code.MEMORY
    assert "20.00 GiB" in found.detail
    assert "cache_clear" in found.remedy


def test_a_certification_that_raises_is_a_reason(on_the_host, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def broken(*arguments: Any) -> Any:
        raise ZeroDivisionError("for the test")

    monkeypatch.setattr(graph_plan, "_build", lambda p, lowering: StandIn(p, KeyError()))
    monkeypatch.setattr(certify, "certify", broken)
    with caplog.at_level(logging.WARNING, "cudnn_flex_compile"):
        found = find_plan.find_plan(forward_key(PROGRAM, *qkv(), [], 0.125, True))
    assert found == Reason(Code.INTERNAL, "ZeroDivisionError: for the test", lasting=False)
    assert "ZeroDivisionError" in caplog.text


# No memory to run in


def ready(call: Any) -> StandIn:
    stand_in = StandIn(problem_of(call), torch.OutOfMemoryError("no 3.00 GiB"))
    engine.plans.put(call, find_plan.CachedPlan(stand_in, (False,) * 4))  # pyright: ignore
    return stand_in


def test_a_forward_without_workspace_runs_elsewhere(on_the_host, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    query, key, value = qkv()
    stand_in = ready(forward_key(PROGRAM, query, key, value, [], 0.125, True))
    monkeypatch.setattr(cuda.inductor, "forward", lambda *given: (given[0] + 1, torch.ones(SHAPE[:3])))
    for _ in range(2):
        out, lse = cuda.forward(query, key, value, [], [], [], PROGRAM, 0.125, True)
    assert stand_in.runs == 2
    assert torch.equal(out, query + 1)
    assert lse.shape == SHAPE[:3]
    assert [r.getMessage().count("no 3.00 GiB") for r in caplog.records] == [1]


def test_a_backward_without_workspace_runs_elsewhere(on_the_host, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = qkv()
    stand_in = ready(backward_key(forward_key(PROGRAM, query, key, value, [], 0.125, True), query))
    monkeypatch.setattr(cuda.inductor, "backward", lambda *given: (given[2] + 1, given[3] + 2, given[4] + 3))
    lse = torch.zeros(SHAPE[:3])
    gradients = cuda.backward(query, None, query, key, value, query, lse, [], [], [], PROGRAM, 0.125)
    assert stand_in.runs == 1
    *of_inputs, of_bias = gradients
    for found, expected in zip(of_inputs, (query + 1, key + 2, value + 3), strict=True):
        assert torch.equal(found, expected)
    assert of_bias.numel() == 0


@pytest.mark.parametrize("lse_gradient", [False, True])
def test_the_loss_says_which_backward_runs(on_the_host, monkeypatch: pytest.MonkeyPatch, lse_gradient: bool) -> None:
    query, key, value = qkv()
    forward = forward_key(PROGRAM, query, key, value, [], 0.125, True)
    plans = {given: ready(backward_key(forward, query, given)) for given in (False, True)}
    ran: list[tuple[Any, ...]] = []
    for stand_in in plans.values():
        monkeypatch.setattr(stand_in, "run", lambda tensors, *_, of=stand_in: ran.append((of, *tensors)))
    lse = torch.full(SHAPE[:3], -math.inf)
    grad_lse = torch.ones(()).expand(SHAPE[:3]) if lse_gradient else None
    cuda.backward(query, grad_lse, query, key, value, query, lse, [], [], [], PROGRAM, 0.125)
    ((of, *tensors),) = ran
    assert of is plans[lse_gradient]
    assert len(tensors) == 9 + lse_gradient
    if lse_gradient:
        assert torch.equal(tensors[6], torch.ones(SHAPE[:3]))
        assert tensors[6].is_contiguous()


def test_no_workspace_while_a_cuda_graph_is_captured_is_an_error(on_the_host, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = qkv()
    ready(forward_key(PROGRAM, query, key, value, [], 0.125, True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(torch.OutOfMemoryError, match="GiB"):
        cuda.forward(query, key, value, [], [], [], PROGRAM, 0.125, True)


@pytest.mark.parametrize("capturing", [True, False])
def test_a_captured_plan_outlives_the_cache(on_the_host, monkeypatch: pytest.MonkeyPatch, capturing: bool) -> None:
    query, key, value = qkv()
    forward = forward_key(PROGRAM, query, key, value, [], 0.125, True)
    refs = []
    for call in (forward, backward_key(forward, query)):
        stand_in = ready(call)
        monkeypatch.setattr(StandIn, "run", lambda *arguments: None)
        refs.append(weakref.ref(stand_in))
    del stand_in
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    cuda.forward(query, key, value, [], [], [], PROGRAM, 0.125, True)
    cuda.backward(query, None, query, key, value, query, torch.zeros(SHAPE[:3]), [], [], [], PROGRAM, 0.125)
    find_plan.cache_clear()
    gc.collect()
    assert [ref() is not None for ref in refs] == [capturing] * 2
    engine.plans.release()
    gc.collect()
    assert [ref() for ref in refs] == [None] * 2


# Threads


def in_threads(count: int, function) -> list[Any]:
    """The results, in any order, of a function that all threads start at once."""
    results: list[Any] = []
    barrier = threading.Barrier(count)

    def body() -> None:
        barrier.wait()
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=body) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_that_want_the_same_plan_share_one(on_the_host, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(problem: Any, lowering: Lowering) -> Any:
        time.sleep(0.05)
        return StandIn(problem, KeyError(), lowering.strategy)

    monkeypatch.setattr(graph_plan, "_build", slow)
    monkeypatch.setattr(certify, "certify", lambda *arguments: None)
    calls = [forward_key(PROGRAM, *qkv(), [], scale, True) for scale in (0.125, 0.25)]
    found = in_threads(8, lambda: [find_plan.find_plan(call) for call in calls])
    assert {id(ready) for pair in found for ready in pair} == {id(engine.plans.peek(call)) for call in calls}
    assert find_plan.cache_info().builds == 2


def test_threads_compile_and_run_the_same_model() -> None:
    def score_mod(score, b, h, q, kv):
        return torch.tanh(score / 2) * 2

    torch._dynamo.reset()
    model = torch.compile(
        lambda q, k, v: flex_attention(q, k, v, score_mod), backend="cudnn_flex", options={"inner_backend": "aot_eager"}
    )
    given = qkv()
    with torch.no_grad(), collect() as report:
        expected = model(*given)

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(*given) for _ in range(5)]

    torch._dynamo.reset()
    for outs in in_threads(4, run):
        assert isinstance(outs, list), outs
        assert all(torch.equal(out, expected) for out in outs)
    assert len(report.lowered) == 1


# Forks, and a library that is missing


def run_script(source: str) -> str:
    script = "import os, sys, threading, time, torch\n" + source
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


MODEL = """
from torch.nn.attention.flex_attention import flex_attention
from cudnn_flex_compile.report.report import collect
def run():
    with torch.no_grad(), collect() as report:
        q = torch.randn(1, 2, 16, 32, dtype=torch.bfloat16)
        options = {"inner_backend": "aot_eager"}
        torch.compile(lambda q: flex_attention(q, q, q, lambda s, *_: s * 2), backend="cudnn_flex", options=options)(q)
    return str([c.reason and c.reason.code.name for c in report.calls])
"""


def test_a_child_that_is_forked_while_locks_are_held_compiles() -> None:
    """And it holds none of the plans, whose memory is the parent's."""
    source = (
        MODEL
        + """
from cudnn_flex_compile.report import report
from cudnn_flex_compile import settings
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.scoremod import ir
engine.plans.put("key", "value")
locks = [report._lock, settings._lock, engine.building, engine.lock, ir._lock]
def hold():
    for lock in locks:
        lock.acquire()
    time.sleep(600)
threading.Thread(target=hold, daemon=True).start()
while not all(lock.locked() for lock in locks):
    time.sleep(0.01)
child = os.fork()
if child == 0:
    print(engine.plans.peek("key"), run(), flush=True)
    os._exit(0)
deadline = time.monotonic() + 90
while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
    time.sleep(0.1)
if done[0] == 0:
    os.kill(child, 9)
print("status", done, flush=True)
os._exit(int(done[0] == 0 or done[1] != 0))
"""
    )
    assert run_script(source).startswith("None [None]\n")


def test_a_model_compiles_where_the_library_is_missing() -> None:
    """The frontend is there, and imports; what it needs is not."""
    source = (
        """
import sysconfig
found = sysconfig.get_path
sysconfig.get_path = lambda name, *rest, **more: "/nowhere" if name == "purelib" else found(name, *rest, **more)
os.environ.pop("LD_LIBRARY_PATH", None)
import cudnn
sysconfig.get_path = found
from cudnn_flex_compile.engine.versions import cudnn_missing, unusable_device
if "cudnnGetVersion" not in str(cudnn_missing()):
    print("the system has a cuDNN of its own:", cudnn_missing())
    sys.exit()
print(unusable_device(0).code.name)
"""
        + MODEL
        + "print(run())\n"
    )
    printed = run_script(source)
    if printed.startswith("the system has"):
        pytest.skip(printed)
    assert printed == "CUDNN_MISSING\n[None]\n"


# Deterministic algorithms


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def forbidden() -> None:
    torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))


def test_certification_may_use_any_algorithm(deterministic, recwarn) -> None:
    with pytest.raises(RuntimeError, match="deterministic"):
        forbidden()
    with any_algorithm():
        forbidden()
        assert torch.are_deterministic_algorithms_enabled()  # it is part of the key of plans
    assert not recwarn.list
    with pytest.raises(RuntimeError, match="deterministic"):
        forbidden()


def test_deterministic_plans_are_others(deterministic) -> None:
    asked = forward_key(PROGRAM, *qkv(), [], 0.125, True)
    torch.use_deterministic_algorithms(False)
    assert problem_of(asked).deterministic
    assert problem_of(backward_key(asked, torch.empty(SHAPE))).deterministic
    assert asked != forward_key(PROGRAM, *qkv(), [], 0.125, True)
