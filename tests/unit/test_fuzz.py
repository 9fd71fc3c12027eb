"""The fuzzer without a GPU: calls, layouts, workers that die, shrinking, scripts, the table, and its judge on the CPU.

Knows nothing of cuDNN.
"""

import csv
import inspect
import io
import math
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cudnn_flex_compile.kernels import cpu
from cudnn_flex_compile.reasons import Code, Reason
from tests.fuzzing import judge as judging
from tests.fuzzing.campaign import Campaign, Outcome, numbered
from tests.fuzzing.cases import case, drawn
from tests.fuzzing.judge import AT_RUN_TIME, judge
from tests.fuzzing.pool import Pool
from tests.fuzzing.repro import script, user_code
from tests.fuzzing.shrink import shrink, simpler
from tests.fuzzing.verdict import DIED, ERROR, KEPT, RIGHT, SKIPPED, WRONG, Verdict
from tests.measure import fuzz
from tests.support.fuzz_judges import INVOLVED, Involved, by_mask, by_number
from tests.support.generated import Call, sees, too_far
from tests.support.layouts import GRADIENTS, LAYOUTS

pytestmark = pytest.mark.any_torch
ROOT = Path(__file__).parents[2]
PLAIN = Call(0, None, "(q >= kv)", (33, 40), 2, torch.float16, True, layout="packed", training=False, lse=True)


# Calls


def test_a_number_of_a_seed_is_a_call() -> None:
    assert case(3, 17) == case(3, 17)
    assert case(3, 17) != case(4, 17)


def test_calls_take_every_way() -> None:
    chance = random.Random(0)
    calls = [drawn(n, chance) for n in range(300)]
    assert {c.layout for c in calls} == set(LAYOUTS)
    assert {c.grad_layout for c in calls} == set(GRADIENTS)
    assert {c.dtype for c in calls} == {torch.bfloat16, torch.float16}
    assert {32, 256} <= {c.dims[0] for c in calls}
    ways = Counter(
        way for c in calls for way, taken in {
            "trains": c.training, "lse": c.lse, "other value dim": c.dims[0] != c.dims[1], "gqa": c.kv_heads < c.heads,
            "one query": c.lengths[0] == 1, "one key": c.lengths[1] == 1, "odd": c.lengths[1] % 2,
            "other lengths": c.lengths[0] != c.lengths[1], "score": c.score is not None, "mask": c.mask is not None,
        }.items() if taken
    )  # fmt: skip
    floors = dict.fromkeys(ways, 60) | {"one query": 5, "one key": 5, "lse": 30, "other value dim": 30}
    assert len(ways) == 10
    assert not {way: n for way, n in ways.items() if n < floors[way]}


SMALL = [n for n in range(60) if (c := case(1, n)).heads * c.batch * c.lengths[0] * c.lengths[1] < 60_000]


@pytest.mark.parametrize("number", SMALL)
def test_stock_precision_is_right_by_the_rule_of_the_judge(number: int) -> None:
    call = case(1, number)
    *qkv, grad = call.inputs("cpu")
    out, lse, *gradients = call.reference(qkv, grad, exact=False)
    assert not too_far(call, (out, *gradients), qkv, grad, lse), call
    wrong = too_far(call, (out,), qkv, grad, lse + 0.125)
    assert ("lse" in wrong) == bool(lse.isfinite().any()), call


def test_most_calls_see_something() -> None:
    calls = [case(2, n) for n in range(30)]
    assert sum(map(sees, calls)) >= 24


# Layouts


@pytest.mark.parametrize("name", GRADIENTS | LAYOUTS)
@pytest.mark.parametrize("lengths", [(9, 9), (5, 9)])
def test_layouts(name: str, lengths: tuple[int, int]) -> None:
    shapes = [(2, 4, lengths[0], 16), (2, 2, lengths[1], 16), (2, 2, lengths[1], 16)]
    drawn = []

    def draw(*shape: int) -> torch.Tensor:
        drawn.append(torch.randn(shape))
        return drawn[-1]

    tensors = (GRADIENTS | LAYOUTS)[name](shapes, draw)
    assert [tuple(t.shape) for t in tensors] == shapes
    assert {t.untyped_storage().data_ptr() for t in tensors} == {t.untyped_storage().data_ptr() for t in drawn}
    packed = {(9, 9): 1, (5, 9): 2}[lengths]
    assert len(drawn) == (packed if name == "packed" else 3)
    expanded = {"shared heads": 1, "one number": 3, "one row": 2}
    zeros = sum(s == 0 for s in tensors[0].stride())
    assert zeros == expanded.get(name, 0) + (name == "one number")
    assert (tensors[0].storage_offset() % 8 != 0) == (name == "misaligned")
    assert (tensors[0].stride(3) > 1) == (name == "transposed")


# The judge, on the CPU

OUT = [*inspect.signature(cpu.forward).parameters].index("out")


def test_right_calls_are_right() -> None:
    assert judge(PLAIN, "cpu").kind == RIGHT
    assert judge(replace(PLAIN, as_block_mask=False, layout="transposed"), "cpu").kind == RIGHT


def test_wrong_numbers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = cpu.forward

    def wrong(*arguments):
        forward(*arguments)
        arguments[OUT][:, :, -1] *= 1.25

    monkeypatch.setattr(cpu, "forward", wrong)
    verdict = judge(PLAIN, "cpu")
    assert verdict.kind == WRONG
    assert re.match("out: off by .*, allowed", verdict.detail)


def test_unwritten_rows_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = cpu.forward

    def unwritten(*arguments):
        forward(*arguments)
        arguments[OUT][:, :, 3] = math.nan

    monkeypatch.setattr(cpu, "forward", unwritten)
    verdict = judge(PLAIN, "cpu")
    assert (verdict.kind, verdict.detail[:9]) == (WRONG, "out: 512 ")


def test_kept_calls_have_a_reason() -> None:
    verdict = judge(replace(PLAIN, score="torch.lgamma(score + 20)"), "cpu")
    assert (verdict.kind, verdict.reason) == (KEPT, "UNKNOWN_OP")


def test_what_runs_elsewhere_after_all_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward for a gradient of an unusual layout, for one."""
    from cudnn_flex_compile.kernels import cuda

    forward = cpu.forward

    def elsewhere(*arguments):
        cuda._explain("a program", Reason(Code.SHAPE_REFUSED, "no engine"))
        forward(*arguments)

    monkeypatch.setattr(cpu, "forward", elsewhere)
    verdict = judge(PLAIN, "cpu")
    assert (verdict.kind, verdict.reason, verdict.detail) == (KEPT, AT_RUN_TIME, "SHAPE_REFUSED: no engine")


def test_a_bug_of_the_pass_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from cudnn_flex_compile.passes import lower_call

    def broken(*arguments):
        raise ZeroDivisionError("for the test")

    monkeypatch.setattr(lower_call, "traced_of", broken)
    verdict = judge(PLAIN, "cpu")
    assert (verdict.kind, verdict.reason) == (ERROR, "INTERNAL")
    assert "ZeroDivisionError" in verdict.detail


def test_an_exception_of_a_lowered_call_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments):
        raise ZeroDivisionError("for the test")

    monkeypatch.setattr(cpu, "forward", broken)
    assert judge(PLAIN, "cpu") == Verdict(ERROR, "ZeroDivisionError: for the test")


def test_no_memory_and_no_call_are_no_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments):
        raise torch.OutOfMemoryError("for the test")

    assert judge(replace(PLAIN, mask="(q >= nowhere[kv])"), "cpu").kind == SKIPPED
    monkeypatch.setattr(judging, "too_far", no_memory)
    assert judge(PLAIN, "cpu") == Verdict(SKIPPED, "out of memory: for the test")


# Shrinking


def shrunk(start: Call, fails) -> tuple[Call, int]:
    steps, tried = shrink(start), 0
    candidate = next(steps)
    while True:
        tried += 1
        try:
            candidate = steps.send(fails(candidate))
        except StopIteration as stop:
            return stop.value, tried


def test_shrinking_leaves_what_fails() -> None:
    found, tried = shrunk(INVOLVED, lambda c: by_mask(c).failed)
    expected = Call(7, None, "padding[b, kv]", (16, 32), 1, torch.float16, False, 1, 1, training=False)
    assert replace(found, lengths=expected.lengths) == expected
    assert 16 < found.lengths[1] <= 32
    assert tried <= 60


def test_what_is_not_simpler_stays() -> None:
    assert shrunk(INVOLVED, lambda c: False)[0] == INVOLVED
    least = Call(0, "score", None, (1, 1), 1, torch.float16, False, 1, 1, training=False)
    assert list(simpler(least)) == []


def test_simpler_calls_are_calls() -> None:
    sources = {(c.score, c.mask) for c in simpler(replace(INVOLVED, mask="((q >= kv) & (table[h, q - kv + 200] > 0))"))}
    assert ("score * scales[h]", "(q >= kv) & (table[h, q - kv + 200] > 0)") in {(s, m and m[1:-1]) for s, m in sources}
    assert ("torch.tanh(score * scales[h])", "q >= kv") in sources
    masks = {mask for _, mask in sources if mask}
    assert not masks & {"table[h, q - kv + 200]", "q", "table"}  # no predicates


# Workers


def campaign(judge, tasks, tmp_path: Path, workers: int = 2, timeout: float = 180.0) -> tuple[Outcome, list[str]]:
    said: list[str] = []
    return Campaign(Pool(judge, workers, timeout), iter(tasks), 10, tmp_path, said.append).run(), said


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, list[str]]:
    patched = pytest.MonkeyPatch()
    patched.setattr("tests.fuzzing.pool.START", 30)
    patched.setattr("tests.fuzzing.campaign.MOST_SHRUNK", 0)  # what shrinking does is tested by itself
    try:
        return campaign(by_number, numbered(None, 9), tmp_path_factory.mktemp("out"), timeout=1)
    finally:
        patched.undo()


def test_every_call_has_a_verdict(outcome) -> None:
    found, _ = outcome
    kinds = {task.number: verdict.kind for task, (verdict, _) in found.calls.items()}
    assert kinds == {0: KEPT, 1: SKIPPED, 2: WRONG, 3: DIED, 4: DIED, 5: DIED, 6: ERROR, 7: RIGHT, 8: RIGHT}
    assert found.kept == {"SLOWER": 1}
    assert found.strategies == {"chained + dense": 2, "": 1}
    assert (found.programs, found.lowered, found.replaced) == (8, 3, 3)


def test_a_death_names_its_call(outcome) -> None:
    found, said = outcome
    details = {f.origin.number: f.verdict.detail for f in found.failures}
    assert details[3] == "the process ended, SIGKILL"
    assert details[4] == "no answer in 1 s"
    assert "a bug of the judge" in details[6]
    assert any(line.startswith("generated_3: died, the process ended, SIGKILL") for line in said)
    assert sorted(f.path.name for f in found.failures) == [f"repro_generated_{n}.py" for n in range(2, 7)]


def test_the_table(outcome, tmp_path: Path) -> None:
    found, _ = outcome
    console = Console(width=110, record=True, file=io.StringIO())
    fuzz.show(found, None, console)
    text = console.export_text()
    rows = {cells[1].strip(): cells[2].strip() for line in text.splitlines() if len(cells := line.split("│")) > 3}
    expected = {"programs": "8", "lowered": "3", "kept": "1", "SLOWER": "1", "failures": "5", "died": "3", "wrong": "1"}
    assert {name: rows.get(name) for name in expected} == expected
    assert "number=3" in text
    fuzz.write_calls(found, tmp_path / "calls.csv")
    with (tmp_path / "calls.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["verdict"] for row in rows][:4] == [KEPT, SKIPPED, WRONG, DIED]


def test_failures_are_made_simpler_and_written(tmp_path: Path) -> None:
    found, said = campaign(by_mask, [Involved(7, 5)], tmp_path, workers=1)
    (failure,) = found.failures
    assert failure.case.mask == "padding[b, kv]"
    assert failure.case.score is None
    assert failure.path == tmp_path / "repro_seed5_7.py"
    assert "mask='padding[b, kv]'" in failure.path.read_text()
    assert "Found as seed5_7" in failure.path.read_text()
    assert len(said) == 2
    assert found.kinds == {WRONG: 1}


def test_no_call_is_handed_out_when_time_is_over(tmp_path: Path) -> None:
    pool = Pool(by_mask, 1)
    assert Campaign(pool, numbered(0, None), -1, tmp_path).run().kinds == {}


# Scripts and the command


def test_a_script_runs_and_says_by_its_exit_code(tmp_path: Path) -> None:
    for call, code in ((PLAIN, 0), (replace(PLAIN, training=True, lse=False), 1)):  # no backward on the CPU
        path = tmp_path / "repro.py"
        path.write_text(script(call, Verdict(WRONG, "out: off"), "Found by hand", path.name))
        done = subprocess.run([sys.executable, path], cwd=ROOT, env={"PYTHONPATH": "."}, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert done.stdout.startswith(f"Verdict(kind='{'error' if code else 'right'}'"), done.stdout


def test_a_script_shows_the_call_as_a_user_writes_it() -> None:
    assert user_code(INVOLVED) == [
        "def score_mod(score, b, h, q, kv):", "    return torch.tanh(score * scales[h])", "def mask_mod(b, h, q, kv):",
        "    return ((q >= kv) | (padding[b, kv] & (kv != 3)))",
        "mask = create_block_mask(mask_mod, 2, 4, 200, 130)",
        "flex_attention(q, k, v, score_mod=score_mod, block_mask=mask, enable_gqa=True)",
    ]  # fmt: skip


@pytest.mark.parametrize(("judge", "code"), [(by_mask, 0), (by_number, 1)])
def test_the_exit_code(judge, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fuzz, "judge", judge)
    monkeypatch.setattr("tests.fuzzing.campaign.MOST_SHRUNK", 0)
    assert fuzz.main(["--generated", "3", "--workers", "1", "--out", str(tmp_path)]) == code
    assert (tmp_path / "calls.csv").exists()
