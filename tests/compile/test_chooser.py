"""The chooser end to end on the CPU: nothing is measured there; where times are made up, they decide and are shown."""

import contextlib
import dataclasses
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import collect
from cudnn_flex_compile.engine.key import problem_of
from cudnn_flex_compile.engine.problem import Binding
from cudnn_flex_compile.engine.tiles import plan as tiles_plan
from cudnn_flex_compile.kernels import inductor_timer
from cudnn_flex_compile.passes import contenders, graph_context
from cudnn_flex_compile.passes.decide import candidate, chooser, measured_times
from cudnn_flex_compile.passes.write import tile_lists
from cudnn_flex_compile.reasons import Code
from tests.support import stand_in
from tests.support.stand_in import CUDA

LENGTH = 256
CPU = torch.device("cpu")


def causal(b, h, q, kv):
    return q >= kv


def attend(q, k, v, mask):
    return flex_attention(q, k, v, block_mask=mask).sin()


def draw():
    return [torch.randn(2, 4, LENGTH, 64).bfloat16() for _ in range(3)]


def run(function=attend, mask_mod=causal, **options):
    mask = create_block_mask(mask_mod, 2, None, LENGTH, LENGTH, device="cpu")
    given = {"inner_backend": "aot_eager", **options}
    torch._dynamo.reset()
    with collect() as report, torch.no_grad():
        torch.compile(function, backend="cudnn_flex", options=given)(*draw(), mask)
    return report


@pytest.mark.parametrize("options", [{}, {"autotune": True}, {"tune_seconds": 0}, {"lower": "always"}], ids=str)
def test_nothing_is_measured_without_a_gpu(monkeypatch, options):
    monkeypatch.setattr(measured_times, "compiling", lambda contest: pytest.fail("a process was started"))
    monkeypatch.setattr(inductor_timer.subprocess, "Popen", lambda *given, **how: pytest.fail("a process was started"))
    (call,) = run(**options).calls
    assert (call.reason, call.strategies) == (None, ("native",))
    assert [c.name for c in call.contenders if c.won] == ["graphs"]
    assert not any(c.measured for c in call.contenders)


@pytest.fixture
def measured(monkeypatch):
    """As if calls could be measured: the times of both sides, which a test sets; and what was asked for."""
    times, asked = {(): (2.0,), ("inductor",): (1.0,)}, []

    def measuring(ways, ready, values, blocks, budget):
        def measure(doubtful):
            assert all(map(ready, set(doubtful) & set(ways)))
            asked.append((tuple(doubtful), values(()), blocks, budget))
            return {way: times[way] for way in doubtful}

        return measure

    monkeypatch.setattr(contenders, "measurable", lambda candidate, values_known: values_known)
    monkeypatch.setattr(contenders, "Measuring", measuring)
    return times, asked


@pytest.mark.parametrize("faster", [False, True])
def test_times_decide_and_are_shown(measured, faster):
    times, asked = measured
    times[()] = (0.5,) if faster else (2.0,)
    report = run(autotune=True)
    (call,) = report.calls
    assert (call.reason is None) == faster
    assert [(c.name, c.milliseconds, c.measured, c.won) for c in call.contenders] == sorted(
        [("inductor", 1.0, True, not faster), ("graphs", times[()][0], True, faster)], key=lambda c: c[1]
    )
    assert "measured here" in str(report)
    if not faster:
        assert call.reason.code is Code.SLOWER
        assert call.reason.detail.endswith("inductor 1.000, graphs 2.000; measured here")
    ((_, values, blocks, budget),) = asked
    assert values == ([], [], [])
    assert blocks.share == 0.75
    assert budget.left == 15


@pytest.mark.parametrize("options", [{"tune_seconds": 0}, {"lower": "always"}, {"strategy": "graphs"}], ids=str)
def test_where_nothing_is_to_be_measured(measured, options):
    assert run(autotune=True, **options).lowered
    assert measured[1] == []


def test_layers_are_measured_once_and_share_a_budget(measured):
    def layers(q, k, v, mask):
        for _ in range(3):
            q = attend(q, k, v, mask)
        return attend(q[:, :2], k[:, :2], v[:, :2], mask)

    assert len(run(layers, autotune=True, tune_seconds=7).kept) == 4
    _, asked = measured
    assert len(asked) == 2
    assert asked[0][3] is asked[1][3]
    assert asked[0][3].left == 7


VISIBLE = torch.arange(LENGTH) % 3 != 1


def padded(b, h, q, kv):
    return (q >= kv) & VISIBLE[kv]


def test_values_of_permuted_keys_are_those_of_the_call(measured):
    run(mask_mod=padded, autotune=True)
    ((_, (operands, _, _), blocks, _),) = measured[1]
    visible = VISIBLE.cumsum(0)
    assert any(torch.equal(operand.flatten()[:LENGTH].long(), visible) for operand in operands)
    assert blocks.partial == 1.0


@pytest.mark.parametrize("ranks", [False, True])
def test_ranks_go_by_nothing_that_differs_between_them(monkeypatch, ranks):
    """The blocks that a mask of captured tensors lists are those of the rank's own data."""
    monkeypatch.setattr(graph_context, "several_ranks", lambda: ranks)
    found = set()
    for count in (16, LENGTH):
        monkeypatch.setattr(__import__(__name__, fromlist=["x"]), "VISIBLE", torch.arange(LENGTH) < count)
        found.add(tuple(run(mask_mod=padded).calls[0].contenders))
    assert len(found) == (1 if ranks else 2)
    masks = {tuple(run(mask_mod=mask).calls[0].contenders) for mask in (causal, causal)}
    assert len(masks) == 1


DOCUMENTS = torch.arange(2 * LENGTH).view(2, LENGTH) // 48


def documents(b, h, q, kv):
    return (q >= kv) & (DOCUMENTS[b, q] == DOCUMENTS[b, kv])


def with_lse(q, k, v, mask):
    out, lse = flex_attention(q, k, v, block_mask=mask, return_lse=True)
    return out.sin() * lse[..., None]


@pytest.fixture
def stood_in(monkeypatch):
    """Plans that compute nothing, timed for real contenders of real calls; what was timed, and the contests."""
    stand_in.install(monkeypatch)
    found = SimpleNamespace(runs=[], contests=[])

    def judge(given):
        key = candidate.forward_call(given, given.running, stand_in.CUDA)
        return candidate._certified(given, key, problem_of(key))

    def milliseconds(runs):
        for run in runs:
            run()
        found.runs.append(len(runs))
        return [1.0 + number for number, _ in enumerate(runs)]

    @contextlib.contextmanager
    def compiling(contest):
        found.contests.append(pickle.loads(pickle.dumps(contest)))
        yield lambda seconds: (100.0,) * (1 + contest.training)

    def by_tiles(problem):
        return stand_in.StandIn(problem, Binding("tile_lists", ()), b'{"workspace": 0}')

    monkeypatch.setattr(tiles_plan, "build", by_tiles)
    monkeypatch.setattr(tile_lists, "unusable", lambda device: None)
    monkeypatch.setattr(contenders, "plan_or_reason", judge)
    monkeypatch.setattr(contenders, "measurable", lambda candidate, values_known: values_known)
    monkeypatch.setattr(measured_times, "compiling", compiling)
    monkeypatch.setattr(measured_times.timing, "milliseconds", milliseconds)
    monkeypatch.setattr(measured_times, "run_clean", lambda function, device: function())
    monkeypatch.setattr(measured_times, "environment", lambda device: stand_in.ENVIRONMENT)
    monkeypatch.setattr(
        measured_times, "forward_call", lambda given, running, device: candidate.forward_call(given, running, CUDA)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    return found


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize(
    ("function", "mask_mod", "ways"),
    [(attend, causal, (2, 4)), (attend, padded, (1, 1)), (attend, documents, (2, 2)), (with_lse, causal, (2, 4))],
    ids=["causal", "permuted keys", "documents", "a loss of the LSE"],
)  # fmt: skip
def test_contenders_of_real_calls(stood_in, trainable, function, mask_mod, ways, training):
    """Each way of ours runs on values of the call, each direction; the other process gets a call that it can run."""
    ways = ways[training]
    mask = create_block_mask(mask_mod, 2, None, LENGTH, LENGTH, device="cpu")
    qkv = [t.requires_grad_(training) for t in draw()]
    options = {"inner_backend": "aot_eager", "autotune": True, "tune_seconds": 600}
    with collect() as report, torch.set_grad_enabled(training):
        torch.compile(function, backend="cudnn_flex", options=options)(*qkv, mask)
    (call,) = report.calls
    assert call.reason is None
    assert [(c.measured, c.won) for c in call.contenders] == [(True, True)] + [(True, False)] * ways
    assert stood_in.runs[-1] == ways * (1 + training), "behind the graphs of each"
    (contest,) = stood_in.contests
    assert (contest.training, contest.lse_gradient) == (training, training and function is with_lse)
    forward, *_ = inductor_timer.contenders(dataclasses.replace(contest, training=False, lse_gradient=False), CPU)
    assert forward().shape == qkv[0].shape


@pytest.mark.parametrize("wins", [True, False])
def test_where_graphs_lose_a_list_of_tiles_is_measured_by_default(stood_in, monkeypatch, wins):
    """The call is real, and its predictions tell nothing. Each way is timed once, and so is Inductor's kernel."""
    monkeypatch.setattr(chooser, "WORTH_MEASURING", 0.0)
    monkeypatch.setattr(chooser, "PREDICTION_ERROR", 1e9)
    times = iter([[300.0], [50.0 if wins else 200.0]])
    monkeypatch.setattr(measured_times.timing, "milliseconds", lambda runs: [run() for run in runs] and next(times))
    (call,) = run(mask_mod=causal, tune_seconds=600).calls
    found = {contender.name: contender.milliseconds for contender in call.contenders}
    assert found == {"graphs": 300.0, "tile lists (forward)": 50.0 if wins else 200.0, "inductor": 100.0}
    assert call.strategies == (("tile_lists",) if wins else ())
    assert len(stood_in.contests) == 1
