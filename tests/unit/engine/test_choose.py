"""Which of a problem's plans is kept: the first right one, or the fastest of all. Plans and times are stand-ins."""

import pytest
import torch

from cudnn_flex_compile.config import Policy
from cudnn_flex_compile.engine import choose
from cudnn_flex_compile.engine.certify.reference import ProgramReference
from cudnn_flex_compile.engine.certify.regimes import REGIMES
from cudnn_flex_compile.engine.choose import OF_SHAPES
from cudnn_flex_compile.engine.find_plan import cache_clear, find_plan
from cudnn_flex_compile.engine.key import backward_key, by_list, forward_key, problem_of
from cudnn_flex_compile.engine.launch import timing
from cudnn_flex_compile.engine.problem import Binding
from cudnn_flex_compile.engine.store import identity
from cudnn_flex_compile.engine.tiles import plan
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.text import text
from tests.support import stand_in
from tests.support.stand_in import call

TUNED = Policy(autotune=True).text

@pytest.fixture
def backend(monkeypatch, tmp_path):
    return stand_in.install(monkeypatch, tmp_path)


@pytest.fixture
def times(monkeypatch):
    """What each strategy takes; what was timed, in order."""
    taken = {"chained": 2.0, "dense": 1.0}
    timed = []
    monkeypatch.setattr(choose, "run_of", lambda plan, forward, reference: plan.strategy)

    def milliseconds(strategies):
        timed.append(strategies)
        return [taken[strategy] for strategy in strategies]

    monkeypatch.setattr(timing, "milliseconds", milliseconds)
    taken["timed"] = timed
    return taken


@pytest.mark.parametrize("backward", [False, True])
def test_the_fastest_is_kept(backend, times, backward):
    assert find_plan(call(backward=backward, policy=TUNED)).plan.strategy == "dense"
    times["chained"] = 0.5
    cache_clear()
    assert find_plan(call(cap=7.0, backward=backward, policy=TUNED)).plan.strategy == "chained"
    assert times["timed"] == [["chained", "dense"]] * (4 if backward else 2)


def test_last_resorts_are_not_built_where_there_is_a_right_plan(backend, times):
    find_plan(call(policy=TUNED))
    assert backend.built == ["chained", "dense"], "none guarded"


def test_what_is_wrong_is_not_timed(backend, times):
    backend.wrong.add("dense")
    assert find_plan(call(policy=TUNED)).plan.strategy == "chained"
    assert times["timed"] == []


def test_without_autotune_nothing_is_timed(backend, times):
    assert find_plan(call()).plan.strategy == "chained"
    assert (times["timed"], backend.built) == ([], ["chained"])


def test_the_choice_is_kept_beside_that_of_the_rules(backend, times):
    """Neither inherits the other's."""
    found = []
    for policy in ("", TUNED, "", TUNED):
        cache_clear()
        found.append(find_plan(call(policy=policy)).plan.strategy)
    assert found == ["chained", "dense"] * 2
    assert (len(backend.built), len(backend.restored), len(times["timed"])) == (3, 2, 1)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["chained", "dense", "native", "parts"])
def test_a_strategy_that_is_forced_is_the_only_one(backend, name, backward):
    """And its verdict is not that of another policy."""
    found = find_plan(call(backward=backward, policy=Policy(strategy=name).text))
    if name in ("chained", "dense"):
        assert found.plan.strategy == name
        assert set(backend.built) == {name}
    else:
        assert isinstance(found, Reason), "a soft cap is not native, and causal no parts"
        assert not backend.built
    assert find_plan(call(backward=backward)).plan.strategy == "chained"


@pytest.mark.parametrize("first", [False, True], ids=["the graph's first", "the list's first"])
def test_each_direction_in_its_own_way_takes_the_forward_that_is_there(backend, monkeypatch, first):
    """Whose outputs a backward is certified on; none is built that will not run."""
    built = []

    def by_tiles(problem):
        built.append(problem.direction)
        return stand_in.StandIn(problem, Binding("tile_lists", ()), b'{"workspace": 0}')

    monkeypatch.setattr(plan, "build", by_tiles)
    forward, backward = plain(), plain(backward=True)
    assert find_plan(by_list(forward, first)).plan.strategy == ("tile_lists" if first else "native")
    assert find_plan(by_list(backward, not first)).plan.strategy == ("native" if first else "tile_lists")
    assert (built, backend.built) == ((["forward"], ["native"]) if first else (["backward"], ["native"]))


def plain(backward=False):
    """The key of a causal call."""
    query, key = stand_in.tensor(4, 256), stand_in.tensor(2, 256)
    program = text(ir.program(mask=make("ge", stand_in.Q, stand_in.KV)))
    found = forward_key(program, query, key, key, [], 0.125, True)
    return backward_key(found, query) if backward else found


def test_another_environment_measures_anew(backend, times, monkeypatch):
    find_plan(call(policy=TUNED))
    cache_clear()
    monkeypatch.setattr(identity, "environment", lambda device: (*stand_in.ENVIRONMENT[:-1], "another device"))
    find_plan(call(policy=TUNED))
    assert len(times["timed"]) == 2


def test_known_kinds_are_certified_on_less(backend):
    for length in (257, 301, 385, 511):  # of one kind; 257 is the first
        find_plan(call(length=length))
    assert backend.regimes == [len(REGIMES)] + [len(OF_SHAPES)] * 3


@pytest.mark.parametrize("change", [{"length": 384}, {"length": 320}, {"length": 600}, {"cap": 3.0}], ids=str)
def test_other_kinds_are_certified_in_full(backend, change):
    """A multiple of 128, an odd multiple of 64, a length beyond a power of two, another program."""
    find_plan(call(length=257))
    find_plan(call(**{"length": 301, **change}))
    assert backend.regimes == [len(REGIMES)] * 2


def test_a_wrong_plan_makes_no_kind_known(backend):
    backend.wrong |= {"chained", "dense"}
    assert find_plan(call(length=257)).code is Code.CERTIFICATION
    backend.wrong.clear()
    backend.regimes.clear()
    assert not isinstance(find_plan(call(length=301)), Reason)
    assert backend.regimes == [len(REGIMES)]


def test_a_guarded_graph_makes_no_other_known(backend, monkeypatch):
    """They have one strategy, and another arithmetic."""
    real, guarded = choose.attempts, []

    def attempts(problem):
        return [a for a in real(problem) if a.variant is None or a.variant[1] == guarded[-1]]

    monkeypatch.setattr(choose, "attempts", attempts)
    for length, guard in ((257, True), (301, False), (385, True), (511, False)):
        guarded.append(guard)
        find_plan(call(length=length))
    assert backend.regimes == [len(REGIMES)] * 2 + [len(OF_SHAPES)] * 2


def test_plans_are_prepared_before_they_are_timed(monkeypatch):
    """As those by tile lists, which run by a list of their mask alone: the forward of a backward, too."""
    ran = []

    class Listed:
        def __init__(self, problem, ready=False):
            self.problem, self.ready, self.device, self.outputs = problem, ready, torch.device("cpu"), ()

        def prepared(self, *values):
            return Listed(self.problem, ready=True)

        def run(self, tensors, *values):
            assert self.ready, "it has no list"
            ran.append(self.problem.direction)

    problem = problem_of(call())
    backward, forward = Listed(problem.backward()), Listed(problem)
    for plan_, before in ((forward, forward), (backward, forward)):
        choose.run_of(plan_, before, ProgramReference(problem.program))()
    assert ran == ["forward", "forward", "backward"]
