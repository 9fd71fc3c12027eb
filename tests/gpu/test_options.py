"""Two models with different options, on real plans: each keeps its own checks, plans and launches."""

import threading

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import cache_info, collect, explain
from cudnn_flex_compile.bench.mods import causal, softcap
from cudnn_flex_compile.engine.ready import Ready
from cudnn_flex_compile.engine.replay import OFTEN
from cudnn_flex_compile.engine.state import engine
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
    ready = [found for found in engine.plans.values() if isinstance(found, Ready)]
    return [found.plan for found in ready if found.plan.problem.replay is replay]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("order", [(CHECKED, UNCHECKED), (UNCHECKED, CHECKED)], ids=["once, off", "off, once"])
def test_two_models_in_turns(order, inner):
    models = [compiled(options, inner) for options in order]
    for length in LENGTHS:
        for model in models:
            model(inputs(length))
    checked, unchecked = plans_of(replay=True), plans_of(replay=False)
    assert len(checked) == len(unchecked) == 2 * len(LENGTHS), "a forward and a backward for each length"
    assert all(plan.errors for plan in checked)
    assert not any(plan.errors for plan in unchecked)
    before = cache_info()
    assert before.certifications >= len(checked)
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
        before = engine.shelf.replays
        for _ in range(3 * OFTEN):
            models[name](qkv)
        replays[name] = engine.shelf.replays - before
    assert replays["on"] > 0
    assert replays["off"] == 0
    assert all(not hasattr(plan, "_replays") or plan._replays is None for plan in plans_of(replay=False))


def test_two_threads():
    barrier, wrong = threading.Barrier(2), []

    def work(options):
        try:
            torch.cuda.set_device(0)
            with torch.cuda.stream(torch.cuda.Stream()):
                model = compiled(options)
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
    assert len(plans_of(replay=True)) == len(plans_of(replay=False)) == 2 * len(LENGTHS)
    assert all(plan.errors for plan in plans_of(replay=True))
    assert not any(plan.errors for plan in plans_of(replay=False))
