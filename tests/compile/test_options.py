"""Options belong to a compile: two models with different ones, in one process, each keep their own checks and plans.

On the CPU; plans are stand-ins, which are asked for at run time as the CUDA kernels ask. tests/gpu/test_options.py runs
the models below on real ones.
"""

import threading

import pytest
import torch
from torch._inductor.utils import fresh_inductor_cache, run_and_get_code
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import flex_attention

from cudnn_flex_compile import cache_info, configure, explain
from cudnn_flex_compile.config import Options
from cudnn_flex_compile.engine.find_plan import find_plan
from cudnn_flex_compile.engine.key import Meta, forward_key, problem_of
from cudnn_flex_compile.engine.problem import TensorSpec
from cudnn_flex_compile.ops import autograd
from cudnn_flex_compile.passes import contenders
from cudnn_flex_compile.passes.decide import candidate
from cudnn_flex_compile.passes.read import programs
from tests.support import stand_in

pytestmark = pytest.mark.any_torch
CHECKED, UNCHECKED = {}, {"certify": "off", "replay": False}
LENGTHS = (128, 192, 256)


def soft_cap(score, b, h, q, kv):
    return torch.tanh(score / 3.0) * 3.0


def capped(q, k, v):
    return flex_attention(q, k, v, soft_cap)


def around(q, k, v):
    """So that Inductor has something to compile."""
    return flex_attention(q.sin(), k, v, soft_cap).cos()


def policy_of(options):
    return Options(**options).policy.text


def compiled(options, function=capped):
    """Of one model, each time anew: a function that no other compile knows."""
    given = {"lower": "always", **options}
    return torch.compile(lambda *qkv: function(*qkv), backend="cudnn_flex", dynamic=True, options=given)


def draw(length, requires_grad=False):
    qkv = (torch.randn(2, length, 2, 16).bfloat16().transpose(1, 2) for _ in range(3))
    return [t.requires_grad_(requires_grad) for t in qkv]


@pytest.fixture
def backend(monkeypatch):
    """What was asked for at run time, by policy, is in `asked`."""
    found, forward = stand_in.install(monkeypatch), autograd.forward
    found.asked = {}
    torch._dynamo.reset()
    programs.clear()

    def judge(given):
        key = candidate.forward_call(given, given.running, stand_in.CUDA)
        return candidate._certified(given, key, problem_of(key))

    def run(query, key, value, operands, ints, floats, program, scale, stats, *kept):
        policy = kept[-1]
        metas = [Meta(TensorSpec.of(t), stand_in.CUDA) for t in (query, key, value, *operands)]
        plan = find_plan(forward_key(program, *metas[:3], metas[3:], scale, stats, policy=policy)).plan
        found.asked.setdefault(policy, {})[query.shape[2]] = plan
        return forward(query, key, value, operands, ints, floats, program, scale, stats, *kept)

    monkeypatch.setattr(contenders, "plan_or_reason", judge)
    monkeypatch.setattr(autograd, "forward", run)
    with torch.no_grad():
        yield found


def assert_each_kept_its_own(backend, lengths=LENGTHS):
    """As many checks as the one that checks has shapes; no plan serves both."""
    checked, unchecked = backend.asked[policy_of(CHECKED)], backend.asked[policy_of(UNCHECKED)]
    assert list(checked) == list(unchecked) == list(lengths)
    assert {plan.problem.replay for plan in checked.values()} == {True}
    assert {plan.problem.replay for plan in unchecked.values()} == {False}
    assert all(plan.errors == stand_in.ERRORS for plan in checked.values())
    assert all(plan.errors == () for plan in unchecked.values())
    assert len(backend.certified) == cache_info().certifications == len(lengths)
    assert len(backend.built) == cache_info().builds == cache_info().size == 2 * len(lengths)


@pytest.mark.parametrize("order", [(CHECKED, UNCHECKED), (UNCHECKED, CHECKED)], ids=["once, off", "off, once"])
def test_two_models_in_turns(backend, order):
    models = [compiled(options) for options in order]
    for _ in range(2):
        for length in LENGTHS:
            for model in models:
                model(*draw(length))
    assert_each_kept_its_own(backend)


@pytest.mark.parametrize("order", [(CHECKED, UNCHECKED), (UNCHECKED, CHECKED)], ids=["once, off", "off, once"])
def test_a_model_that_is_compiled_between_the_shapes_of_another(backend, order):
    first, second = (compiled(options) for options in order)
    first(*draw(LENGTHS[0]))
    for length in LENGTHS:
        second(*draw(length))
    built = len(backend.built)
    first(*draw(LENGTHS[0]))
    assert len(backend.built) == built, "its plan is still there"
    for length in LENGTHS:
        first(*draw(length))
    assert_each_kept_its_own(backend)


def test_two_threads(backend):
    barrier, wrong = threading.Barrier(2), []

    def work(options):
        try:
            model = compiled(options)
            barrier.wait()
            with torch.no_grad():
                for length in LENGTHS * 2:
                    model(*draw(length))
        except BaseException as error:  # raised again below
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(options,)) for options in (CHECKED, UNCHECKED)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]
    assert_each_kept_its_own(backend)


def test_explain_changes_nothing(backend):
    model = compiled(CHECKED)
    model(*draw(LENGTHS[0]))
    explain(capped, *draw(LENGTHS[0]), options={"lower": "always", **UNCHECKED}).assert_all_lowered()
    built = len(backend.built)
    model(*draw(LENGTHS[0]))
    assert len(backend.built) == built
    certified = len(backend.certified)
    model(*draw(LENGTHS[1]))
    assert len(backend.certified) == certified + 1


def test_a_recompile_drops_nothing(backend):
    """It would do so by turns, at each recompile of either."""
    models = [compiled(options) for options in (CHECKED, UNCHECKED)]
    for batch in (2, 3):
        for model in models:
            model(*(t[:1].expand(batch, -1, -1, -1).contiguous() for t in draw(128)))
    sizes = [cache_info().size]
    for model in models:
        model(*(t.float().bfloat16() for t in draw(128)))
        sizes.append(cache_info().size)
    assert sizes == sorted(sizes)


def test_what_the_process_shares_is_no_option():
    with pytest.raises(Exception, match=r"configure\(plan_cache_size=4\) once, or set CUDNN_FLEX_PLAN_CACHE_SIZE"):
        compiled({"plan_cache_size": 4})(*draw(64))


def test_a_wrong_setting_of_the_process_is_said_when_a_model_is_compiled(monkeypatch):
    monkeypatch.setenv("CUDNN_FLEX_CACHE_MB", "0")
    with pytest.raises(Exception, match="setting cache_mb=0; valid values: 1 and more"):
        compiled({})(*draw(64))


def test_plans_are_bounded_by_the_process(backend, monkeypatch):
    monkeypatch.delenv("CUDNN_FLEX_PLAN_CACHE_SIZE", raising=False)
    configure(plan_cache_size=3)
    models = [compiled(options) for options in (CHECKED, UNCHECKED)]
    for length in LENGTHS:
        for model in models:
            model(*draw(length))
    assert (cache_info().size, cache_info().bound, cache_info().evictions) == (3, 3, 3)


def codes(options, monkeypatch):
    """Inductor's code of the forward and of the backward."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)  # or it refuses to train on the CPU
    torch._dynamo.reset()
    qkv = draw(96, requires_grad=True)
    model = compiled(options, around)

    def step():
        model(*qkv).sum().backward()

    return run_and_get_code(step)[1]


def test_a_compiled_graph_carries_its_policy(monkeypatch):
    """Forward and backward, also from Inductor's caches, where graphs of other policies are kept beside it."""
    given = [{}, {"certify": "always", "replay": False}, {"certify": "off", "autotune": True}, {}]
    with fresh_inductor_cache():
        for options in given:
            found, policy = codes(options, monkeypatch), policy_of(options)
            calls = [line for code in found for line in code.splitlines() if "cudnn_flex.undispatched_" in line]
            assert [("undispatched_forward" in line) for line in calls] == [True, False]
            assert all(line.endswith(f"{policy!r})") for line in calls), calls
