"""Plain scores by tile lists, end to end on the CPU: which calls and directions, the graphs, numbers and BlockMasks."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from cudnn_flex_compile import config, ops
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.passes import contenders
from cudnn_flex_compile.passes.write import tile_lists
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.report.report import collect
from tests.support.fastest import KEPT, make_fastest
from tests.support.plain_masks import MASKS, assert_right, attend, block_mask, inputs

BATCH, LENGTH = 2, 160
BOTH = FORWARD, BACKWARD
SEEN = []  # the graphs that the inner backend was given


@pytest.fixture(autouse=True)
def on_cpu(trainable, monkeypatch):
    """As if there were kernels by tile lists for the CPU."""
    monkeypatch.setattr(tile_lists, "unusable", lambda device: None)
    SEEN.clear()


def see(graph_module, example_inputs):
    SEEN.append(graph_module.graph)
    return graph_module


torch._dynamo.register_backend(name="see_tile_lists")(see)


def compiled(function=attend, **options):
    given = {"inner_backend": "see_tile_lists", **options}
    return torch.compile(function, backend="cudnn_flex", dynamic=False, options=given)


def call(name):
    """The arguments of a call, a gradient, and its mask."""
    qkv, grad = inputs(BATCH, LENGTH, 4, 2, 16, torch.bfloat16, "cpu")
    mask_mod = MASKS[name](BATCH, LENGTH, "cpu")
    return (*qkv, block_mask(mask_mod, BATCH, LENGTH, "cpu", 32)), grad, mask_mod


def lists_of_calls():
    """Of each attention op, whether its forward and its backward have a list."""
    (graph,) = SEEN
    return [[n.args[i] is not None for i in (13, 14)] for n in graph.nodes if n.target is ops.attention]


@pytest.mark.parametrize("name", MASKS)
def test_all_plain_masks_run_by_a_list(name):
    arguments, grad, mask_mod = call(name)
    with collect() as report:
        out = compiled(strategy="tile_lists")(*arguments)
    assert [c.strategies for c in report.calls] == [("tile_lists",)], report.calls[0].reason
    assert lists_of_calls() == [[True, True]]
    assert_right(out, arguments[:3], grad, mask_mod)


@pytest.mark.parametrize("directions", [(FORWARD,), (BACKWARD,), BOTH, ()], ids=" and ".join)
@pytest.mark.parametrize("name", ["causal", "full", "right padding"])
def test_each_direction_runs_in_its_own_way(monkeypatch, name, directions):
    make_fastest(monkeypatch, directions)
    arguments, grad, mask_mod = call(name)
    with collect() as report:
        out = compiled(lower="always")(*arguments)
    (found,) = lists_of_calls()
    assert found == [way in directions for way in BOTH]
    graph = "native"
    expected = [("tile_lists" if way in directions else graph) for way in BOTH]
    assert report.calls[0].strategies in (tuple(expected), tuple(expected[:1]))
    compared = [n for n in SEEN[0].nodes if n.target is ops.check_block_mask]
    assert len(compared) == (name != "full" and directions != BOTH), "a list is the guard of calls by it alone"
    assert_right(out, arguments[:3], grad, mask_mod)


@pytest.mark.parametrize("directions", [(FORWARD,), (BACKWARD,), BOTH], ids=" and ".join)
def test_checkpointed_layers(monkeypatch, directions):
    make_fastest(monkeypatch, directions)

    def layers(q, k, v, mask):
        for _ in range(2):
            q = torch.utils.checkpoint.checkpoint(attend, q, k, v, mask, use_reentrant=False)
        return q

    arguments, grad, _ = call("causal")
    with collect() as report:
        out = compiled(layers, lower="always", inner_backend="aot_eager")(*arguments)
        found = torch.autograd.grad(out, arguments[:3], grad)
    assert len(report.calls) == 2
    for reported in report.calls:
        assert ("tile_lists" in reported.strategies[:1]) == (FORWARD in directions)
    expected = torch.autograd.grad(layers(*arguments), arguments[:3], grad)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() <= 2**-6 * theirs.norm()


def test_the_gradient_of_the_log_sum_exp(monkeypatch):
    """As learned sinks have it, in each direction's own way."""

    def with_sinks(q, k, v, mask):
        out, lse = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, return_lse=True)
        return out * torch.sigmoid(lse - 0.5).unsqueeze(-1).to(out.dtype)

    arguments, grad, _ = call("sinks + window")
    expected = torch.autograd.grad(with_sinks(*arguments), arguments[:3], grad)
    for directions in ((FORWARD,), (BACKWARD,), BOTH):
        torch._dynamo.reset()
        make_fastest(monkeypatch, directions)
        with collect() as report:
            out = compiled(with_sinks, lower="always", inner_backend="aot_eager")(*arguments)
            found = torch.autograd.grad(out, arguments[:3], grad)
        assert "tile_lists" in report.calls[0].strategies, report.calls[0].reason
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine - theirs).norm() <= 2**-6 * theirs.norm()


def test_without_gradients_the_forward_is_all(monkeypatch):
    make_fastest(monkeypatch, (FORWARD,))
    arguments, _, _ = call("causal")
    with collect() as report, torch.no_grad():
        compiled(lower="always")(*arguments)
    assert report.calls[0].strategies == ("tile_lists",)
    assert not [n for n in SEEN[0].nodes if n.target is ops.check_block_mask]


def test_keys_that_plans_would_permute_are_all_or_nothing(monkeypatch):
    arguments, grad, mask_mod = call("scattered padding")
    for directions, expected in ((BOTH, ("tile_lists",)), ((FORWARD,), ("chained",))):
        torch._dynamo.reset()
        make_fastest(monkeypatch, directions)
        with collect() as report:
            out = compiled(lower="always")(*arguments)
        assert report.calls[0].strategies == expected
        assert_right(out, arguments[:3], grad, mask_mod)


def test_what_the_kernels_refuse_is_tried_by_plans(monkeypatch):
    """And is the reason where a list is forced."""
    refused, judge = Reason(Code.SHAPE_REFUSED, "no such head dim"), contenders.plan_or_reason
    make_fastest(monkeypatch, BOTH)
    monkeypatch.setattr(contenders, "plan_or_reason", lambda given: refused if given.tiled else judge(given))
    arguments, _, _ = call("causal")
    for options, expected in (({"lower": "always"}, (("native",), None)), ({"strategy": "tile_lists"}, ((), refused))):
        torch._dynamo.reset()
        with collect() as report:
            compiled(**options)(*arguments)
        assert (report.calls[0].strategies, report.calls[0].reason) == expected


@pytest.mark.parametrize("code", [Code.LSE_GRADIENT, Code.CERTIFICATION, Code.SHAPE_REFUSED, Code.MEMORY])
def test_what_plans_do_not_give_is_tried_by_a_list(monkeypatch, code):
    judge = contenders.plan_or_reason
    monkeypatch.setattr(contenders, "plan_or_reason", lambda given: judge(given) if given.tiled else Reason(code, "no"))
    arguments, grad, mask_mod = call("causal")
    with collect() as report:
        out = compiled(lower="always")(*arguments)
    assert report.calls[0].strategies[0] == "tile_lists"
    assert_right(out, arguments[:3], grad, mask_mod)


@pytest.fixture
def exact():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("strategy", ["tile_lists", "graphs"])
@pytest.mark.parametrize("name", MASKS)
def test_deterministic_algorithms(exact, name, strategy):
    """None of our ops is one that torch refuses then, and two runs give the same bits."""
    arguments, grad, mask_mod = call(name)
    function = compiled(strategy=strategy)
    with collect() as report:
        runs = [function(*arguments) for _ in range(2)]
    assert report.lowered, report.calls[0].reason
    found = [(out.detach(), *torch.autograd.grad(out, arguments[:3], grad, retain_graph=True)) for out in runs]
    assert all(map(torch.equal, *found))
    assert_right(runs[0], arguments[:3], grad, mask_mod)


def test_short_calls_do_not():
    arguments, _, _ = call("causal")
    with collect() as report:
        compiled(lower="always")(*arguments)
    assert report.calls[0].strategies == ("native",)


def test_what_is_slower_than_inductor_in_all_ways_is_kept(monkeypatch):
    make_fastest(monkeypatch, KEPT)
    arguments, _, _ = call("causal")
    with collect() as report:
        compiled()(*arguments)
    (found,) = report.calls
    assert found.reason.code is Code.SLOWER
    assert [(c.name, c.won) for c in found.contenders] == [
        ("inductor", True), ("graphs", False), ("tile lists (forward, backward)", False),
        ("tile lists (forward)", False), ("tile lists (backward)", False),
    ]  # fmt: skip


def soft_cap(score, b, h, q, kv):
    return torch.tanh(score / 20) * 20


FORCED = {
    "inductor": ((), ()), "graphs": (("native",), ("chained",)), "native": (("native",), ()),
    "chained": (("chained",), ("chained",)), "tile_lists": (("tile_lists",), ()),
    "tile_lists_forward": (("tile_lists", "native"), ()), "tile_lists_backward": (("native", "tile_lists"), ()),
}  # fmt: skip


@pytest.mark.parametrize("strategy", FORCED)
def test_a_way_can_be_forced(strategy):
    arguments, _, _ = call("causal")

    def two(q, k, v, mask):
        return attend(q, k, v, mask) + flex_attention(q, k, v, soft_cap, mask, enable_gqa=True)

    with collect() as report:
        compiled(two, strategy=strategy)(*arguments)
    assert [c.strategies for c in report.calls] == list(FORCED[strategy])
    for found in report.calls:
        assert found.strategies or f"strategy={strategy!r}" in found.reason.detail, found.reason


def test_an_unknown_way_is_answered_by_a_list_of_all():
    every = ", ".join(map(repr, config.FORCED))
    with pytest.raises(Exception, match=every):
        compiled(strategy="fast")(*call("causal")[0])
