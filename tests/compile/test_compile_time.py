"""What compiling takes grows with distinct programs, not with layers: by counted work, never by the clock.

On the CPU; plans are stand-ins (tests/support/stand_in.py), which tests/gpu/test_compile_time.py replaces by real ones.
"""

import gc
import sys
import weakref

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from cudnn_flex_compile.engine.key import problem_of
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.passes import contenders
from cudnn_flex_compile.passes import lower_graph as module
from cudnn_flex_compile.passes.decide import candidate
from cudnn_flex_compile.passes.read import programs
from cudnn_flex_compile.report.report import COUNTS, PHASES, collect
from cudnn_flex_compile.testing import flex_report  # noqa: F401  (a fixture, as a user's test has it)
from tests.support import stand_in
from tests.support.layers import KINDS, inputs, model

pytestmark = pytest.mark.any_torch
OPTIONS = {"inner_backend": "eager", "lower": "always"}
# Python functions that the pass calls for one more layer whose functions were traced before. Measured: 1200 (soft cap)
# to 1700 (ALiBi, which has an operand of its own); 35000 when every layer was traced.
CALLS_A_LAYER = 3000
NODES_A_LAYER = 2  # an op and its output take the place of flex_attention and its own; an operand takes one or two


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Knows no program and no plan; calls of CPU tensors ask for plans as those of CUDA tensors do."""
    backend = stand_in.install(monkeypatch)
    torch._dynamo.reset()
    programs.clear()
    torch.manual_seed(0)

    def judge(given):
        call = candidate.forward_call(given, given.running, stand_in.CUDA)
        return candidate._certified(given, call, problem_of(call))

    monkeypatch.setattr(contenders, "plan_or_reason", judge)
    with torch.no_grad():
        yield backend


def compiled(function, **options):
    return torch.compile(function, backend="cudnn_flex", options={**OPTIONS, **options})


def compile_model(kinds, monkeypatch):
    """The report, how many Python functions the pass called, and how many nodes it added."""
    work = {"calls": 0, "nodes": 0}
    lower_calls = module.lower_calls

    def profile(frame, event, argument):
        work["calls"] += event == "call"

    def counted(graph_module, *rest):
        before = len(graph_module.graph.nodes)
        sys.setprofile(profile)
        try:
            return lower_calls(graph_module, *rest)
        finally:
            sys.setprofile(None)
            work["nodes"] = len(graph_module.graph.nodes) - before

    torch._dynamo.reset()
    programs.clear()
    stand_in.find_plan.cache_clear()
    with monkeypatch.context() as patch, collect() as report:
        patch.setattr(module, "lower_calls", counted)
        compiled(model(kinds))(inputs())
    report.assert_all_lowered()
    assert len(report.calls) == len(kinds)
    return report.counts, work["calls"], work["nodes"]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_layers_are_nearly_free(kind, monkeypatch):
    """48 build as many plans as one, and each further one costs the same few calls."""
    found = {n: compile_model([kind] * n, monkeypatch) for n in (1, 12, 24, 48)}
    for n, (counts, _, nodes) in found.items():
        assert counts == {
            **dict.fromkeys(COUNTS, 0), "graphs": 1, "programs traced": 1, "programs shared": n - 1,
            "plans found": n - 1, "builds": 1, "certifications": 1,
        }  # fmt: skip
        assert nodes <= NODES_A_LAYER * n
    calls = {n: calls for n, (_, calls, _) in found.items()}
    early, late = (calls[24] - calls[12]) / 12, (calls[48] - calls[24]) / 24
    assert late <= CALLS_A_LAYER
    assert late <= 1.1 * early, "no more for a layer in a larger model"


def test_work_grows_with_distinct_programs(monkeypatch):
    for layers in (3, 12, 48):
        counts, _, _ = compile_model([KINDS[i % 3] for i in range(layers)], monkeypatch)
        assert (counts["programs traced"], counts["builds"], counts["certifications"]) == (3, 3, 3)


def test_layers_that_are_compiled_one_by_one_share_too(fresh):
    """Each is a graph of its own, as after a graph break."""
    x = inputs()
    with collect() as report:
        for layer in model(["soft cap"] * 6):
            torch._dynamo.reset()  # which would else know the code of the layer before
            x = compiled(layer)(x)
    assert (report.counts["graphs"], report.counts["programs traced"]) == (6, 1)
    assert len(fresh.built) == 1


def test_another_model_shares_too():
    compiled(model(["soft cap", "ALiBi"]))(inputs())
    with collect() as report:
        compiled(model(["ALiBi", "soft cap"]))(inputs())
    assert (report.counts["programs traced"], report.counts["programs shared"]) == (0, 2)
    report.assert_plans_built(at_most=0)


def capped(cap):
    return lambda s, b, h, q, kv: torch.tanh(s / cap) * cap


def reading(*tables):
    if len(tables) == 1:
        return lambda s, b, h, q, kv: s + tables[0][h] - tables[0][h] * 0.5
    return lambda s, b, h, q, kv: s + tables[0][h] - tables[1][h] * 0.5


A, B = torch.arange(4.0), torch.arange(4.0) + 10
PAIRS = {
    "constants": (capped(5.0), capped(5.0 + 2**-20)),
    "signs of zero": (lambda s, b, h, q, kv: s * 0.0 + s, lambda s, b, h, q, kv: s * -0.0 - s),
    "an integer and a float": (lambda s, b, h, q, kv: s + q // 3, lambda s, b, h, q, kv: s + q / 3),
    "order": (lambda s, b, h, q, kv: s - (q - kv), lambda s, b, h, q, kv: s - (kv - q)),
    "axes": (lambda s, b, h, q, kv: s + A[h], lambda s, b, h, q, kv: s + A[b]),
    "one tensor or two": (reading(A, A), reading(A, B)),
    "two tensors, turned round": (reading(A, B), reading(B, A)),
    "dtypes": (reading(A), reading(A.to(torch.bfloat16))),
    "masking or not": (
        lambda s, b, h, q, kv: torch.where(q >= kv, s, -float("inf")),
        lambda s, b, h, q, kv: torch.where(q >= kv, s, 0.0),
    ),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_functions_that_differ_never_share(pair):
    """Two in one model, in both orders: the numbers are those of eager flex_attention."""
    qkv = [torch.randn(2, 4, 96, 16, dtype=torch.bfloat16) for _ in range(3)]
    for first, second in (pair, pair[::-1]):
        programs.clear()
        torch._dynamo.reset()

        def both(q, k, v, mods=(first, second)):
            return [flex_attention(q, k, v, mod) for mod in mods]

        with collect() as report:
            found = compiled(both, inner_backend="aot_eager")(*qkv)
        report.assert_all_lowered()
        for out, mod in zip(found, (first, second), strict=True):
            expected = flex_attention(*qkv, mod)
            assert (out.double() - expected.double()).abs().max() <= 2**-6 * max(1.0, float(expected.abs().max()))


def test_autocast_is_another_program():
    """It computes in other dtypes, though the functions read the same."""
    half = torch.rand(96, dtype=torch.bfloat16)
    qkv = [torch.randn(1, 2, 96, 16, dtype=torch.bfloat16) for _ in range(3)]
    keys = []
    for enabled in (False, True):
        torch._dynamo.reset()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), collect() as report:
            compiled(lambda q, k, v: flex_attention(q, k, v, lambda s, b, h, i, j: s + half[j]))(*qkv)
        keys.append(report.counts["programs traced"])
    assert keys == [1, 1]


def test_kept_calls_are_traced_once_too():
    def model_of(count):
        def run(q, k, v):
            for _ in range(count):
                q = flex_attention(q, k, v, lambda s, b, h, i, j: torch.special.bessel_j0(s))
            return q

        return run

    qkv = [torch.randn(1, 2, 64, 16, dtype=torch.bfloat16) for _ in range(3)]
    with collect() as report:
        compiled(model_of(8))(*qkv)
    assert len(report.kept) == 8
    assert {str(c.reason) for c in report.kept} == {str(report.kept[0].reason)}
    assert report.counts["programs shared"] == 7


def test_graphs_do_not_outlive_the_model():
    seen = []
    lower = module._lower

    def watched(call, context):
        seen.append(weakref.ref(call.node.graph))
        return lower(call, context)

    module._lower = watched
    try:
        compiled(model(["soft cap", "ALiBi"]))(inputs())
    finally:
        module._lower = lower
    torch._dynamo.reset()
    engine.references.clear()
    gc.collect()
    assert len(seen) == 2
    assert [ref() for ref in seen] == [None, None]


def test_a_users_test(flex_report):  # noqa: F811
    compiled(model(["soft cap", "ALiBi", "soft cap"]))(inputs())
    flex_report.assert_all_lowered()
    flex_report.assert_plans_built(at_most=2, at_least=2)
    flex_report.assert_certified(at_most=2)
    flex_report.assert_no_recompiles()
    with pytest.raises(AssertionError, match="expected at most 1 plans, got 2"):
        flex_report.assert_plans_built(at_most=1)
    with pytest.raises(AssertionError, match="expected at least 3 plans, got 2"):
        flex_report.assert_plans_built(at_most=9, at_least=3)
    with pytest.raises(AssertionError, match="expected at most 1 certified plans, got 2"):
        flex_report.assert_certified(at_most=1)


def test_seconds_of_phases(flex_report):  # noqa: F811
    compiled(model(["soft cap"]))(inputs())
    seconds = flex_report.seconds
    assert set(seconds) == set(PHASES)
    assert all(seconds[name] > 0 for name in ("lower", "trace", "solve", "build", "certify", "inner"))
    assert seconds["restore"] == seconds["keep"] == 0, "there is no cache folder"
    assert seconds["trace"] + seconds["solve"] + seconds["build"] + seconds["certify"] <= seconds["lower"]
    assert set(flex_report.to_dict()["counts"]) == set(COUNTS)


def test_recompiles_are_counted(flex_report):  # noqa: F811
    function = compiled(lambda q, k, v: flex_attention(q, k, v, capped(3.0)), inner_backend="aot_eager")
    for length in (64, 128, 192):
        function(*[torch.randn(1, 2, length, 16, dtype=torch.bfloat16) for _ in range(3)])
        if length == 64:
            flex_report.assert_no_recompiles()
    assert flex_report.counts["recompiles"] == 1, "the second length made it dynamic"
    with pytest.raises(AssertionError, match="expected at most 0 recompiles, got 1"):
        flex_report.assert_no_recompiles()


def test_reports_within_reports():
    with collect() as outer:
        with collect() as inner:
            compiled(model(["soft cap"]))(inputs())
        torch._dynamo.reset()
        compiled(model(["window"]))(inputs())
    assert (inner.counts["graphs"], outer.counts["graphs"]) == (1, 2)
    assert (len(inner.calls), len(outer.calls)) == (1, 2)
