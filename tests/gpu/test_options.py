"""Two models with different options, on real plans: each keeps its own checks, plans and launches."""

import threading
from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import cache_clear, cache_info, collect, explain
from cudnn_flex_compile.bench.mods import causal, softcap
from cudnn_flex_compile.engine.launch.replay import RECORD_AFTER
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, TensorSpec, dense
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.store.plan_cache import CachedPlan
from tests.gpu.test_behaviour import assert_right, draw

CHECKED, UNCHECKED = {}, {"certify": "off", "replay": False}
LENGTHS = (256, 384, 512)


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    engine.reset()
    torch.manual_seed(0)


def compiled(options, inner="aot_eager"):
    """A step of one model, each time anew: a function that no other compile knows; a graph for each length.

    Its numbers are judged if its plans are.
    """
    masks = {n: create_block_mask(causal, None, None, n, n, device="cuda") for n in LENGTHS}
    given = {"inner_backend": inner, "lower": "always", **options}
    call = torch.compile(
        lambda q, k, v, mask: flex_attention(q, k, v, softcap(2.0), mask), backend="cudnn_flex", options=given,
        dynamic=False,
    )  # fmt: skip

    def step(qkv):
        out = call(*qkv, masks[qkv[0].shape[2]])
        grad = torch.randn_like(out)
        gradients = torch.autograd.grad(out, qkv, grad)
        if "certify" not in options:
            assert_right(out, qkv, softcap(2.0), causal, grad, gradients)

    return step


def inputs(length):
    return [draw(length=length) for _ in range(3)]


def plans_of(replay):
    """Those of either model."""
    ready = [found for found in engine.plans.values() if isinstance(found, CachedPlan)]
    return [found.plan for found in ready if found.plan.problem.replay is replay]


def assert_each_has_plans_of_its_own():
    """Of the same problems, a forward and a backward for each length; those of one model are checked.

    Where AOTAutograd does not guess that gradients are laid out like outputs (guess_tangent_strides_as_outputs, which
    depends on torch's version), aot_eager hands them on contiguous. For that layout there is one more backward.
    """
    checked, unchecked = plans_of(replay=True), plans_of(replay=False)
    problems, others = ([replace(plan.problem, replay=True) for plan in plans] for plans in (checked, unchecked))
    assert len(problems) == len(others) == len(set(problems))
    assert set(problems) == set(others)
    assert {(p.direction, p.lengths) for p in problems} == {(d, (n, n)) for d in (FORWARD, BACKWARD) for n in LENGTHS}
    assert {p.grad.stride for p in problems if p.grad is not None} <= {s.stride for n in LENGTHS for s in layouts(n)}
    assert all(plan.errors for plan in checked)
    assert not any(plan.errors for plan in unchecked)


def layouts(length):
    """That of the output, and the contiguous one."""
    given = TensorSpec.of(draw(length=length))
    return given, dense(given)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("order", [(CHECKED, UNCHECKED), (UNCHECKED, CHECKED)], ids=["once, off", "off, once"])
def test_two_models_in_turns(order, inner):
    models = [compiled(options, inner) for options in order]
    for length in LENGTHS:
        for model in models:
            model(inputs(length))
    assert_each_has_plans_of_its_own()
    before = cache_info()
    assert before.certifications >= len(plans_of(replay=True))
    for length in LENGTHS:
        for model in reversed(models):
            model(inputs(length))
    after = cache_info()
    assert (after.builds, after.certifications, after.size) == (before.builds, before.certifications, before.size)


def test_a_new_shape_is_checked_whatever_was_compiled_since():
    model = compiled(CHECKED)
    model(inputs(LENGTHS[0]))
    compiled(UNCHECKED)(inputs(LENGTHS[0]))
    explain(
        lambda q, k, v: flex_attention(q, k, v, softcap(5.0)), *inputs(LENGTHS[0]),
        options={"inner_backend": "aot_eager", "lower": "always", **UNCHECKED},
    ).assert_all_lowered()  # fmt: skip
    with collect() as report:
        model(inputs(LENGTHS[0]))
    report.assert_plans_built(at_most=0)
    with collect() as report:
        model(inputs(LENGTHS[1]))
    report.assert_certified(at_least=2, at_most=20)


def test_launches_are_replayed_for_the_model_that_did_not_refuse_it():
    models, qkv = {name: compiled(options) for name, options in (("on", CHECKED), ("off", UNCHECKED))}, inputs(256)
    replays = {}
    for name in ("on", "off", "on"):
        before = engine.graph_pool.replays
        for _ in range(3 * RECORD_AFTER):
            models[name](qkv)
        replays[name] = engine.graph_pool.replays - before
    assert replays["on"] > 0
    assert replays["off"] == 0
    assert all(not hasattr(plan, "_replays") or plan._replays is None for plan in plans_of(replay=False))


def test_two_threads():
    """They compile one after the other, for torch lets nobody call a compiled function while another thread traces a
    graph. Then both look for all plans anew, and run, at once.
    """
    barrier, tracing, wrong = threading.Barrier(2, action=cache_clear), threading.Lock(), []

    def work(options):
        try:
            torch.cuda.set_device(0)
            with torch.cuda.stream(torch.cuda.Stream()):
                model = compiled(options)
                with tracing:
                    for length in LENGTHS:
                        model(inputs(length))
                torch.cuda.synchronize()
                barrier.wait()
                for length in LENGTHS * 2:
                    model(inputs(length))
        except BaseException as error:  # raised again below
            wrong.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(options,)) for options in (CHECKED, UNCHECKED)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]
    assert_each_has_plans_of_its_own()
