"""A rejected plan: one warning that names the call and a script, and the script itself. Plans are stand-ins."""

import logging
import runpy

import pytest

from cudnn_flex_compile.config import Policy
from cudnn_flex_compile.engine import candidates, choose, find_plan, repro, worker
from cudnn_flex_compile.engine.certify.reference import ProgramReference
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, Problem
from cudnn_flex_compile.kernels import cuda
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod.text import text
from tests.unit.engine.certify.test_certify import PROGRAM, WRONG, StandIn, problem

PROBLEM = problem(PROGRAM, FORWARD)
NOT_BUILT = Reason(Code.SHAPE_REFUSED, "no engine")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(repro, "_warned", set())
    monkeypatch.setattr(repro, "folder", lambda: tmp_path)
    monkeypatch.setattr(worker, "run_clean", lambda function, device: function())


def stand_in(strategy, wrong, problem=PROBLEM):
    plan = StandIn(problem, WRONG["no mask"] if wrong else None)
    plan.strategy = strategy
    return plan


def tried(monkeypatch, *plans, reference=None, certify="once"):
    """The plan of a problem for which these are the attempts: (strategy, whether it is wrong), or a reason."""
    made = [p if isinstance(p, Reason) else stand_in(*p) for p in plans]
    found = [candidates.Attempt(lambda plan=plan: plan) for plan in made]
    monkeypatch.setattr(choose, "attempts", lambda problem: found)
    return choose.choose(PROBLEM, None, reference or ProgramReference(PROGRAM), Policy(certify))


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


class Sourced(ProgramReference):
    source = 'File "model.py", line 7, in layer'


def test_a_kept_call_is_warned_of_once(monkeypatch, caplog, tmp_path):
    found = tried(monkeypatch, ("chained", True), ("dense", True), reference=Sourced(PROGRAM))
    assert found.code is Code.CERTIFICATION
    (message,) = warnings(caplog)
    (path,) = tmp_path.iterdir()
    for part in ('File "model.py", line 7', "chained, forward, unit normal: out is off by", "kept", str(path)):
        assert part in message
    tried(monkeypatch, ("chained", True), ("dense", True))
    assert len(warnings(caplog)) == 1


def test_a_strategy_that_another_replaces_is_warned_of(monkeypatch, caplog):
    assert tried(monkeypatch, ("chained", True), NOT_BUILT, ("dense", False)).strategy == "dense"
    (message,) = warnings(caplog)
    assert "chained, forward" in message
    assert "It runs as dense instead" in message


def test_another_variant_of_the_same_strategy_is_no_news(monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        assert tried(monkeypatch, ("chained", True), ("chained", False)).strategy == "chained"
    assert warnings(caplog) == []
    assert "certification rejected a plan" in caplog.text


def test_nothing_is_said_of_plans_that_are_right_or_not_built(monkeypatch, caplog, tmp_path):
    tried(monkeypatch, NOT_BUILT, ("chained", False))
    assert tried(monkeypatch, NOT_BUILT) == NOT_BUILT
    assert warnings(caplog) == []
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written_to(monkeypatch, caplog):
    def folder():
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(repro, "folder", folder)
    assert isinstance(tried(monkeypatch, ("chained", True)), Reason)
    (message,) = warnings(caplog)
    assert "No script to reproduce it could be written" in message
    assert "Read-only file system" in message


def exit_code(path):
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(path), run_name="__main__")
    return stopped.value.code


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_the_script_says_whether_the_plan_is_wrong(direction, monkeypatch, tmp_path, capsys):
    """It makes the rejected attempt of the same problem again: the second one."""
    asked = problem(PROGRAM, direction)
    rejection = repro.Rejection(1, "chained", Reason(Code.CERTIFICATION, 'odd """ text \\'))
    path = tmp_path / "repro.py"
    path.write_text(repro.script(rejection, asked, "a call"))
    problems, second = [], [stand_in("chained", True, asked)]

    def of(given: Problem):
        problems.append(given)
        forward = stand_in("native", False, problem(PROGRAM, FORWARD))
        plans = [NOT_BUILT, second[0]] if given.direction == direction else [NOT_BUILT, forward]
        return [lambda plan=plan: plan for plan in plans]

    monkeypatch.setattr(candidates, "attempts", of)
    assert exit_code(path) == 1
    assert "off by" in capsys.readouterr().out
    assert problems[0] == asked
    second[0] = stand_in("chained", False, asked)
    assert exit_code(path) == 0
    second[0] = NOT_BUILT
    assert exit_code(path) == 0
    assert "not built: SHAPE_REFUSED" in capsys.readouterr().out


def test_the_kernel_does_not_repeat_it(monkeypatch, caplog):
    monkeypatch.setattr(cuda, "_warned", set())
    found = tried(monkeypatch, ("chained", True))
    cuda._explain(text(PROBLEM.program), found)
    assert len(warnings(caplog)) == 1
    cuda._explain("another program", found)
    assert len(warnings(caplog)) == 2


@pytest.mark.parametrize(("mode", "checked"), [("once", 1), ("always", 1), ("off", 0)])
def test_modes_and_the_count_of_seconds(mode, checked, monkeypatch):
    find_plan.cache_clear()
    tried(monkeypatch, ("chained", False), certify=mode)
    info = find_plan.cache_info()
    assert info.certifications == checked
    assert (info.certify_seconds > 0) == bool(checked)
