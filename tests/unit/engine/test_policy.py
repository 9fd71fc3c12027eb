"""Compiles with options of their own, in one process: none changes the checks, plans or launches of another.

Plans are stand-ins. A program of its own (a cap) is a model; its calls ask for plans as its graph does when it runs.
"""

import itertools
import random
import threading

import pytest

from cudnn_flex_compile.config import CERTIFY, Policy, policy_from
from cudnn_flex_compile.engine import choose
from cudnn_flex_compile.engine.certify.regimes import REGIMES
from cudnn_flex_compile.engine.find_plan import cache_clear, cache_info, find_plan
from cudnn_flex_compile.engine.key import Call, backward_key, forward_of, policy_of, problem_of
from cudnn_flex_compile.engine.launch import timing
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.reasons import Code
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.optable import make
from tests.support import stand_in
from tests.support.stand_in import call

pytestmark = pytest.mark.any_torch
POLICIES = [Policy(*fields).text for fields in itertools.product(CERTIFY, (False, True), (False, True))]
LENGTHS = (128, 192, 256, 320)


@pytest.fixture
def backend(monkeypatch):
    """Timing has the second plan win."""
    monkeypatch.setattr(choose, "run_of", lambda plan, forward, reference: None)
    monkeypatch.setattr(timing, "milliseconds", lambda plans: [1.0 / (1 + number) for number, _ in enumerate(plans)])
    return stand_in.install(monkeypatch)


@pytest.mark.parametrize("first", ["", "certify=off replay=False"])
def test_no_policy_changes_what_another_gives(backend, first):
    """In both orders. The fault of the review: "off" turned the checks of all models off, and dropped their plans."""
    second = "certify=off replay=False" if not first else ""
    found = {policy: find_plan(call(policy=policy)) for policy in (first, second)}
    assert {policy: find_plan(call(policy=policy)) for policy in (second, first)} == found
    assert backend.certified == ["chained"], "that of the model which asked for it"
    find_plan(call(policy=second, length=384))
    find_plan(call(policy=first, length=384))
    assert backend.certified == ["chained"] * 2
    assert [found[policy].plan.problem.replay for policy in ("", "certify=off replay=False")] == [True, False]
    assert cache_info().size == cache_info().builds == 4


def test_a_plan_that_was_never_checked_serves_no_one_who_checks(backend):
    backend.wrong |= {"chained", "dense"}
    assert find_plan(call(policy="certify=off")).plan.strategy == "chained"
    for policy in ("", "certify=always"):
        assert find_plan(call(policy=policy)).code is Code.CERTIFICATION


def test_nor_does_it_stand_behind_a_backward(backend):
    """Whose check runs the forward's plan first."""
    backend.wrong |= {"chained", "dense"}
    find_plan(call(policy="certify=off", backward=True))
    assert find_plan(call(backward=True)).code is Code.CERTIFICATION
    assert backend.certified == ["chained", "dense"] * 2, "the forward's, with its ends guarded in the end"


def test_nor_makes_it_its_kind_known(backend):
    find_plan(call(policy="certify=off", length=257))
    find_plan(call(length=301))
    assert backend.regimes == [len(REGIMES)]


def test_always_is_in_full_whatever_others_have_checked(backend):
    find_plan(call(length=257))
    find_plan(call(length=301, policy="certify=always"))
    assert backend.regimes == [len(REGIMES)] * 2


@pytest.mark.parametrize("policy", POLICIES)
def test_a_backward_goes_with_the_forward_of_its_own_policy(policy):
    key = call(backward=True, policy=policy)
    forward = forward_of(key)
    assert (policy_of(key), policy_of(forward)) == (policy_from(policy),) * 2
    given = stand_in.tensor(4, 256)
    assert backward_key(forward, given) == key
    assert forward_of(backward_key(forward, given, True)) == forward
    assert Call(*forward)._replace(stats=False) == Call(*call(policy=policy))
    assert problem_of(key).replay == problem_of(forward).replay == policy_from(policy).replay


PREFIX = make("or", make("ge", stand_in.Q, stand_in.KV), make("lt", stand_in.KV, ir.const(512, ir.I32)))
MADE_OF_OTHERS = {  # how a plan is made of others, and a call of which it is
    "parts": {"length": 4096, "mask": PREFIX},
    "parts, backward": {"length": 4096, "mask": PREFIX, "backward": True},
    "folded": {"backward": True, "lse_gradient": True},
    "folded parts": {"length": 4096, "mask": PREFIX, "backward": True, "lse_gradient": True},
}


def launched(plan):
    """Of a plan, itself or those that it is made of, which alone launch."""
    return [found for part in plan.parts for found in launched(part)] or [plan]


@pytest.mark.parametrize("policies", [("", "replay=False"), ("replay=False", "")], ids=["on, off", "off, on"])
@pytest.mark.parametrize("case", MADE_OF_OTHERS)
def test_all_plans_that_one_is_made_of_are_replayed_as_its_policy_says(monkeypatch, tmp_path, case, policies):
    """Those that are built, and those that are restored: a stored plan is the same for both policies."""
    backend = stand_in.install(monkeypatch, tmp_path)
    for policy in policies:
        plan = find_plan(call(policy=policy, **MADE_OF_OTHERS[case])).plan
        plans = launched(plan)
        assert plan not in plans
        assert len(plans) == (2 if "parts" in case else 1)
        assert [found.problem.replay for found in plans] == [policy == ""] * len(plans)
    assert backend.restored, "for the second policy"


def test_a_text_that_is_no_policy_is_an_error(backend):
    with pytest.raises(ValueError, match="policy='certify=maybe'"):
        find_plan(call(policy="certify=maybe"))


def outcome(found):
    return found.code if not hasattr(found, "plan") else (found.plan.strategy, found.plan.problem)


def expected_of(key, wrong):
    """What a process gives that knows this call alone."""
    policy = policy_of(key)
    if policy.certify != "off" and wrong == {"chained", "dense"}:
        return Code.CERTIFICATION
    first = "chained" if "chained" not in wrong or policy.certify == "off" else "dense"
    both = policy.certify == "off" or not wrong
    return ("dense" if policy.autotune and both else first), problem_of(key)


@pytest.mark.parametrize("seed", range(40))
def test_any_interleaving_gives_what_each_alone_would(backend, seed):
    """Of compiles by any policies, of plans that are dropped, and of strategies that are wrong."""
    draw = random.Random(seed)
    backend.wrong = set(draw.choice([(), ("chained",), ("chained", "dense")]))
    policies = draw.sample(POLICIES, draw.randint(2, 5))
    seen = {}
    for _ in range(60):
        if draw.random() < 0.03:
            cache_clear()
            seen.clear()
        key = call(20.0, draw.choice(LENGTHS), None, draw.random() < 0.4, False, draw.choice(policies))
        built, certified = len(backend.built), len(backend.certified)
        found = find_plan(key)
        assert outcome(found) == expected_of(key, backend.wrong)
        if key in seen:
            assert found is seen[key]
            assert (len(backend.built), len(backend.certified)) == (built, certified)
        elif policy_of(key).certify == "off":
            assert len(backend.certified) == certified, "nobody asked for it"
        seen[key] = found


@pytest.mark.parametrize("seed", range(5))
def test_threads_that_compile_by_different_policies(backend, seed):
    """Each finds what it would find alone, once; all count together."""
    draw, wrong = random.Random(seed), []
    policies = draw.sample(POLICIES, 4)
    backend.wrong = {"chained"}
    barrier = threading.Barrier(len(policies))

    def work(policy, order):
        try:
            barrier.wait()
            calls = itertools.product(LENGTHS, (False, True))
            keys = [call(20.0, length, None, backward, False, policy) for length, backward in calls]
            for _ in range(3):
                order.shuffle(keys)
                for key in keys:
                    found = find_plan(key)
                    assert outcome(found) == expected_of(key, backend.wrong)
                    assert engine.plans.get(key) is found
        except BaseException as error:  # raised again below
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(p, random.Random(f"{seed} {p}"))) for p in policies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]
    assert cache_info().builds == len(backend.built)
    assert cache_info().certifications == len(backend.certified)
