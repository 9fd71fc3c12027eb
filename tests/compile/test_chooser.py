"""The chooser end to end on the CPU: nothing is measured there; where times are made up, they decide and are shown."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import collect
from cudnn_flex_compile.kernels import inductor_timer
from cudnn_flex_compile.passes import contenders, graph_context
from cudnn_flex_compile.passes.decide import measured_times
from cudnn_flex_compile.reasons import Code

LENGTH = 256


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
