"""Verdicts that outlive a process: a second one builds nothing, and none is inherited by what differs in anything."""

import json
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cudnn_flex_compile import configure, settings
from cudnn_flex_compile.engine.certify.reference import SubgraphReference
from cudnn_flex_compile.engine.find_plan import cache_clear, cache_info, find_plan, remember_reference
from cudnn_flex_compile.engine.key import forward_of, problem_of
from cudnn_flex_compile.engine.plans import box_plan
from cudnn_flex_compile.engine.plans import graph_plan as plan
from cudnn_flex_compile.engine.plans.folded_output import FoldedPlan
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, TensorSpec
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.store import identity
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.partition import partition
from tests.support import stand_in
from tests.support.mask_sources import normal
from tests.support.stand_in import call

pytestmark = pytest.mark.any_torch
MIB = 1


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def backend(monkeypatch, folder):
    monkeypatch.setenv("CUDNN_FLEX_CACHE_MB", str(MIB))
    return stand_in.install(monkeypatch, folder)


def again(backend, key):
    """What a process finds that knows nothing but the folder, and how many plans it built and restored."""
    cache_clear()
    backend.built.clear()
    backend.restored.clear()
    return find_plan(key), len(backend.built), len(backend.restored)


def files(folder):
    return sorted(folder.glob("*.plan"))


@pytest.mark.parametrize("backward", [False, True])
def test_a_plan_is_built_once(backend, backward):
    key = call(backward=backward)
    first = find_plan(key)
    certified = len(backend.certified)
    second, built, restored = again(backend, key)
    assert (built, restored) == (0, 1 + backward)
    assert len(backend.certified) == certified, "the stored verdict counts"
    assert (second.plan.strategy, second.plan.problem, second.copies) == (
        first.plan.strategy,
        first.plan.problem,
        first.copies,
    )
    assert (second.plan.binding, second.plan.data) == (first.plan.binding, first.plan.data)
    assert second.plan.errors == first.plan.errors == stand_in.ERRORS
    info = cache_info()
    assert (info.builds, info.certifications, info.restored) == (0, 0, 1 + backward)


def test_a_copy_of_the_folder_serves_another_machine(backend, folder, tmp_path, monkeypatch):
    key = call(backward=True)
    find_plan(key)
    shutil.copytree(folder, tmp_path / "another")
    shutil.rmtree(folder)
    monkeypatch.setenv("CUDNN_FLEX_CACHE_DIR", str(tmp_path / "another"))
    settings.forget()
    _, built, restored = again(backend, key)
    assert (built, restored) == (0, 2)


def test_a_plan_around_another_is_built_once(backend, monkeypatch):
    """Where no plan takes a gradient of the log-sum-exp; it is another verdict than that of the plain backward."""
    refusal = Reason(Code.SHAPE_REFUSED, "too many row vectors")
    monkeypatch.setattr(plan, "build", lambda p, lowering: refusal if p.lse_gradient else backend.build(p, lowering))
    key = call(backward=True, lse_gradient=True)
    first = find_plan(key)
    assert (first.plan.strategy, first.plan.problem) == ("chained, folded", problem_of(key))
    second, built, restored = again(backend, key)
    assert (built, restored) == (0, 2)
    assert isinstance(second.plan, FoldedPlan)
    assert (second.plan.strategy, second.plan.problem) == (first.plan.strategy, first.plan.problem)
    assert second.plan.inner.problem == first.plan.inner.problem == FoldedPlan.inner_problem(problem_of(key))
    assert second.layouts == first.layouts
    assert second.plan.errors == stand_in.ERRORS
    assert find_plan(call(backward=True)).plan.strategy == "chained"


@pytest.mark.parametrize("lse_gradient", [False, True])
def test_the_gradient_of_the_log_sum_exp_is_part_of_the_problem(backend, lse_gradient):
    find_plan(call(backward=True, lse_gradient=not lse_gradient))
    backend.built.clear()
    found = find_plan(call(backward=True, lse_gradient=lse_gradient))
    assert found.plan.problem.lse_gradient == lse_gradient
    assert len(backend.built) == 1


def test_a_restored_plan_is_remembered(backend):
    find_plan(call())
    again(backend, call())
    find_plan(call())
    assert (cache_info().restored, len(backend.restored)) == (1, 1)


def test_a_failure_is_found_out_once(backend):
    backend.wrong |= {"chained", "dense"}
    first = find_plan(call())
    assert first.code is Code.CERTIFICATION
    second, built, restored = again(backend, call())
    assert second == first
    assert (built, restored, cache_info().restored) == (0, 0, 1)


def test_a_refusal_is_found_out_once(backend):
    backend.refuses |= {"chained": "no engine", "dense": "no engine"}
    first = find_plan(call())
    assert again(backend, call())[:2] == (first, 0)


def test_the_strategy_that_passed_is_restored(backend):
    backend.wrong.add("chained")
    assert find_plan(call()).plan.strategy == "dense"
    assert again(backend, call())[0].plan.strategy == "dense"
    assert backend.restored == ["dense"]


def test_what_may_pass_is_not_stored(backend, folder):
    backend.short = True
    assert not find_plan(call()).lasting
    assert not files(folder)
    backend.short = False
    assert again(backend, call())[0].plan.strategy == "chained"


def test_one_passing_reason_among_lasting_ones_is_not_stored(backend, folder, monkeypatch):
    build = backend.build

    def first_short(problem, lowering):
        backend.short = lowering.strategy == "chained"
        backend.refuses["dense"] = "no engine"
        return build(problem, lowering)

    monkeypatch.setattr("cudnn_flex_compile.engine.plans.graph_plan.build", first_short)
    found = find_plan(call())
    assert isinstance(found, Reason)
    assert not files(folder)


@pytest.mark.parametrize(
    ("error", "code"), [(torch.OutOfMemoryError("CUDA out of memory"), Code.MEMORY), (KeyError("a bug"), Code.INTERNAL)]
)
def test_what_went_wrong_in_certification_is_not_stored(backend, folder, monkeypatch, error, code):
    def certify(*_):
        raise error

    with monkeypatch.context() as short:
        short.setattr("cudnn_flex_compile.engine.certify.certify.certify", certify)
        assert find_plan(call()).code is code
    assert not files(folder)
    assert again(backend, call())[0].plan.strategy == "chained"


# rule: built in a second process where the first passed, and where it failed
RULES = {"": (0, 0), "certify=always": (1, 4), "certify=off": (1, 1)}


@pytest.mark.parametrize(("rule", "built"), RULES.items(), ids=RULES)
def test_rules_of_certification(backend, folder, rule, built):
    """Which verdicts are trusted, and which are kept. Without certification, none passed."""
    certified = rule != "certify=off"
    find_plan(call(policy=rule))
    assert again(backend, call(policy=rule))[1] == built[0]
    assert len(files(folder)) == certified
    backend.wrong |= {"chained", "dense"}
    find_plan(call(cap=7.0, policy=rule))
    assert again(backend, call(cap=7.0, policy=rule))[1] == built[1]
    assert len(files(folder)) == 2 * certified


def test_a_newer_verdict_replaces_the_older(backend):
    """A plan that passed once and fails now: "always" finds out, and "once" believes it from then on."""
    find_plan(call())
    backend.wrong |= {"chained", "dense"}
    assert again(backend, call(policy="certify=always"))[0].code is Code.CERTIFICATION
    assert again(backend, call())[:2] == (find_plan(call()), 0)
    assert isinstance(find_plan(call()), Reason)


def reference(fingerprint):
    return SubgraphReference(None, None, (), (), (), None, fingerprint=fingerprint)


def test_other_functions_do_not_inherit_a_verdict(backend, folder):
    """Even if both became the same program, which is then wrong for one of them."""
    problem = problem_of(call())
    for number, fingerprint in enumerate(("first", "second")):
        remember_reference(problem, reference(fingerprint))
        assert again(backend, call())[1] == 1
        assert len(files(folder)) == number + 1
    for fingerprint in ("first", "second"):
        remember_reference(problem, reference(fingerprint))
        assert again(backend, call())[1] == 0


def asked(fingerprint):
    return (lambda: reference(fingerprint)), fingerprint


@pytest.mark.parametrize("backward", [False, True])
def test_a_plan_that_other_functions_find_is_compared_with_them(backend, backward):
    """Without being built. If it is wrong for them, it stays for the first ones."""
    key, first, second = call(backward=backward), asked("first"), asked("second")
    ready = find_plan(key, *first)
    built, certified = len(backend.built), len(backend.certified)
    assert find_plan(key, *first) is ready
    assert len(backend.certified) == certified
    backend.wrong.add("chained")
    found = find_plan(key, *second)
    assert found.code is Code.CERTIFICATION
    assert find_plan(key, *first) is find_plan(key) is ready
    backend.wrong.clear()
    for _ in range(3):
        assert find_plan(key, *second) is ready
    assert (len(backend.built), len(backend.certified)) == (built, certified + 2)


def test_a_backward_is_compared_with_other_functions_though_its_forward_was_dropped(backend):
    key = call(backward=True)
    find_plan(key, *asked("first"))
    del engine.plans._entries[forward_of(key)]
    backend.certified.clear()
    backend.wrong.add("chained")
    assert isinstance(find_plan(key, *asked("second")), Reason)
    assert backend.certified
    backend.wrong.clear()
    cache_clear()
    ready = find_plan(key, *asked("first"))
    del engine.plans._entries[forward_of(key)]
    assert find_plan(key, *asked("second")) is ready


def test_memory_short_in_comparing_a_plan_again(backend, monkeypatch):
    def certify(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    ready = find_plan(call(), *asked("first"))
    with monkeypatch.context() as short:
        short.setattr("cudnn_flex_compile.engine.certify.certify.certify", certify)
        assert find_plan(call(), *asked("second")).lasting is False
    assert find_plan(call(), *asked("second")) is ready


def test_no_plan_is_shared_unseen_while_a_graph_is_captured(backend, monkeypatch):
    ready = find_plan(call(), *asked("first"))
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert find_plan(call(), *asked("first")) is ready
        found = find_plan(call(), *asked("second"))
        assert (found.code, found.lasting) == (Code.CERTIFICATION, False)
    assert find_plan(call(), *asked("second")) is ready


def test_functions_without_a_fingerprint_keep_nothing(backend, folder):
    remember_reference(problem_of(call()), reference(None))
    assert [again(backend, call())[1] for _ in range(2)] == [1, 1]
    assert not files(folder)


@pytest.mark.parametrize("line", range(len(stand_in.ENVIRONMENT)))
def test_another_environment_inherits_nothing(backend, monkeypatch, line):
    find_plan(call())
    changed = [f"{text} newer" if i == line else text for i, text in enumerate(stand_in.ENVIRONMENT)]
    with monkeypatch.context() as other:
        other.setattr(identity, "environment", lambda device: tuple(changed))
        assert again(backend, call())[1] == 1
    assert again(backend, call())[1] == 0, "both are there"


def test_the_environment_has_all_that_plans_depend_on(monkeypatch):
    device = {"name": "H200", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 150_000_000_000}
    parts = {"torch": "2.13.0", "CUDA": "13.0", "frontend": "1.32.0", "cudnn": "92800", "driver": "13000", "code": "a"}

    def found(**changes):
        new = {**device, **parts, **changes}
        monkeypatch.setattr(identity, "versions", lambda: (new["torch"], new["frontend"], new["cudnn"]))
        monkeypatch.setattr(identity, "driver", lambda: new["driver"])
        monkeypatch.setattr(identity, "code_digest", lambda: new["code"])
        monkeypatch.setattr(torch.version, "cuda", new["CUDA"])
        properties = SimpleNamespace(**{name: new[name] for name in device})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        return identity.environment.__wrapped__(0)

    lines = [found(), *(found(**{name: f"{value}1"}) for name, value in {**device, **parts}.items())]
    assert len(set(lines)) == len(lines)
    assert lines[0] == found()


def test_the_digest_is_that_of_the_code(monkeypatch, tmp_path):
    for folder in identity.CODE:
        (tmp_path / folder / "inner").mkdir(parents=True)
        (tmp_path / folder / "inner" / "file.py").write_text("x = 1")
    monkeypatch.setattr(identity, "PACKAGE", tmp_path)
    digests = [identity.code_digest.__wrapped__()]
    for change in (lambda p: p.write_text("x = 2"), lambda p: p.rename(p.with_name("other.py"))):
        for path in sorted(tmp_path.rglob("*.py")):
            change(path)
            digests.append(identity.code_digest.__wrapped__())
    assert len(set(digests)) == len(digests)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "file.py").write_text("x = 1")
    assert identity.code_digest.__wrapped__() == digests[-1], "what makes no plans has no part in it"


def spec(*shape, dtype=torch.bfloat16):
    return TensorSpec(shape, tuple(torch.empty(shape, device="meta").stride()), dtype)


CHANGES = [
    {"program": ir.program()}, {"direction": BACKWARD}, {"query": spec(2, 4, 16, 64)}, {"key": spec(2, 4, 17, 64)},
    {"value": spec(2, 4, 16, 32)}, {"out": spec(2, 4, 16, 32)}, {"operands": (spec(1, 4, 1, 1),)},
    {"operands": (spec(1, 4, 1, 1), spec(1, 4, 1, 1))}, {"operands": (spec(1, 4, 1, 1, dtype=torch.float32),)},
    {"scale": 0.125 + 2**-55}, {"scale": 0.0}, {"scale": -0.0}, {"stats": True}, {"deterministic": True},
    {"grad": spec(2, 4, 16, 64)}, {"gradients": (spec(2, 4, 16, 64),) * 3},
    {"query": TensorSpec((2, 4, 256, 64), (1, 2, 3, 4), torch.bfloat16)},
]  # fmt: skip


def test_the_text_of_a_problem_has_all_of_it():
    problem = problem_of(call())
    problems = [problem, *(replace(problem, **change) for change in CHANGES)]
    texts = [identity.problem_text(p) for p in problems]
    assert len(set(texts)) == len(texts)
    assert identity.problem_text(replace(problem, device=3)) == texts[0], "the kind of device is in the environment"
    assert problem.direction == FORWARD


PREFIX = partition(normal("(q >= kv) | (kv < 512)"))[0].mask


def test_a_call_of_several_plans(backend, folder):
    """One entry with all parts, each restored for its own box: forward, forward with stats, backward."""
    for backward in (False, True):
        key = call(length=4096, mask=PREFIX, backward=backward)
        first = find_plan(key).plan
        second, built, _ = again(backend, key)
        assert built == 0
        assert second.plan.strategy == first.strategy == "parts (chained, chained)"
        assert [p.problem for p in second.plan.parts] == [p.problem for p in first.parts]
        assert [p.data for p in second.plan.parts] == [p.data for p in first.parts]
    assert len(files(folder)) == 3


def test_parts_that_changed_are_a_miss(backend, monkeypatch):
    key = call(length=4096, mask=PREFIX)
    find_plan(key)
    right = box_plan.divided
    for change in (lambda boxes: None, lambda boxes: boxes[::-1]):
        left = [change]  # while the stored plan is restored, and not when a new one is built
        with monkeypatch.context() as other:
            other.setattr(box_plan, "divided", lambda *a: left.pop()(right(*a)) if left else right(*a))
            assert again(backend, key)[1] == 2


@pytest.mark.parametrize("fault", [{"unreadable": True}, {"drift": 16}], ids=str)
def test_a_plan_that_cannot_be_restored_is_built_anew(backend, fault):
    find_plan(call())
    for name, value in fault.items():
        setattr(backend, name, value)
    found, built, _ = again(backend, call())
    assert (found.plan.strategy, built) == ("chained", 1)


def test_a_plan_that_cannot_be_serialised_runs_all_the_same(backend, folder, monkeypatch):
    def refuse(plan):
        raise ValueError("not this graph")

    monkeypatch.setattr(stand_in.StandIn, "serialized", refuse)
    assert find_plan(call()).plan.strategy == "chained"
    assert not files(folder)


def test_without_a_folder_nothing_is_kept(monkeypatch, folder):
    backend = stand_in.install(monkeypatch)
    find_plan(call())
    assert again(backend, call())[1] == 1
    assert not folder.exists()


def test_the_same_folder_stays_the_same_store(folder, backend):
    """Its log line about a folder that cannot be written comes once, not once a graph."""
    store = engine.store
    configure(plan_cache_size=300, cache_mb=MIB)
    assert engine.store is store
    assert (store.folder, store.bound) == (folder, MIB * 2**20)


def test_a_folder_that_is_set_later_is_used_from_then_on(monkeypatch, folder):
    backend = stand_in.install(monkeypatch, folder)
    monkeypatch.delenv("CUDNN_FLEX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    engine.reset()
    assert engine.store.folder == folder / "cudnn_flex_compile"
    configure(cache_dir=folder / "mine")
    find_plan(call())
    assert again(backend, call())[1] == 0
    assert (len(files(folder / "mine")), (folder / "cudnn_flex_compile").exists()) == (1, False)


LENGTHS = list(range(128, 128 + 20 * 64, 64))
PROCESS = """
    import json, os, signal, sys
    from pathlib import Path
    import pytest
    from cudnn_flex_compile.engine.find_plan import cache_info, find_plan
    from cudnn_flex_compile.reasons import Reason
    from tests.support import stand_in

    folder, start, die_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    backend = stand_in.install(pytest.MonkeyPatch(), folder, wrong={"dense"})
    replace, writes = os.replace, []

    def dying(*paths):
        writes.append(paths)
        if len(writes) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = dying
    lengths = json.loads(sys.argv[4])
    found = {}
    for length in lengths[start:] + lengths[:start]:
        backend.refuses = {"chained": "no engine"} if length % 128 else {}
        for backward in (False, True):
            plan = find_plan(stand_in.call(length=length, backward=backward))
            found[f"{length} {backward}"] = str(plan) if isinstance(plan, Reason) else plan.plan.data.decode().strip()
    print(json.dumps({"found": dict(sorted(found.items())), **cache_info()._asdict()}))
"""


def process(folder, start=0, die_at=0, lengths=LENGTHS):
    arguments = [sys.executable, "-c", textwrap.dedent(PROCESS), str(folder), str(start), str(die_at)]
    return subprocess.Popen([*arguments, json.dumps(lengths)], stdout=subprocess.PIPE, text=True)


def result(running):
    out, _ = running.communicate(timeout=600)
    assert running.returncode == 0
    return json.loads(out)


def test_processes(folder):
    """One after another, then with every tenth entry damaged, then after one that was killed in a write."""
    first, second = result(process(folder)), result(process(folder))
    assert first["builds"] > 0
    assert (second["builds"], second["certifications"]) == (0, 0)
    assert second["found"] == first["found"]
    assert sum(text.startswith("CERTIFICATION") for text in first["found"].values()) == len(LENGTHS), "half of them"
    entries, draw = files(folder), random.Random(0)
    for path in entries[::10]:
        data = path.read_bytes()
        at = draw.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    third = result(process(folder))
    assert third["found"] == first["found"]
    assert third["restored"] == len(entries) - len(entries[::10])
    for path in files(folder)[::2]:
        path.unlink()
    killed = process(folder, die_at=3)
    killed.communicate(timeout=600)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(folder.glob("*.part"))) == 1
    last = result(process(folder))
    assert last["found"] == first["found"]
    assert result(process(folder))["builds"] == 0


def test_four_processes_at_once_on_an_empty_folder(folder):
    workers = [process(folder, start) for start in (0, 5, 10, 15)]
    results = [result(worker) for worker in workers]
    assert all(r["found"] == results[0]["found"] for r in results)
    assert sum(r["builds"] for r in results) > 0
    after = result(process(folder))
    assert after["builds"] == 0
    assert after["found"] == results[0]["found"]
