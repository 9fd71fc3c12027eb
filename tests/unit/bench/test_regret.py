"""The regret of the chooser: the cases, the comparison of contenders, files, and the whole command on the CPU."""

import contextlib
import dataclasses
import json
import math

import pytest
import torch
from rich.console import Console

from cudnn_flex_compile.bench.case import STOCK
from cudnn_flex_compile.bench.mods import BY_BATCH, ENTRIES, KNOWN
from cudnn_flex_compile.bench.processes import ENDED, Processes
from cudnn_flex_compile.bench.regret import command, worker
from cudnn_flex_compile.bench.regret.cases import SETS, chosen
from cudnn_flex_compile.bench.regret.result import COLUMNS, DEFAULT, Contender, Result, read_csv, write_csv
from cudnn_flex_compile.bench.regret.show import show, summary
from cudnn_flex_compile.cli import main
from cudnn_flex_compile.config import FORCED, LISTS
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD

pytestmark = pytest.mark.any_torch
CAUSAL, FRAMES = "causal at 2,16,16,4096,128", "frames at 2,16,16,4096,128"
LAST = "last keys at 8,32,8,1/8192,128, forward alone"
INSIDE = "causal at 8,12,12,128,64, in a model"


def cases(*names, tiny=False):
    return chosen(list(names), torch.bfloat16, tiny)


def test_the_sets():
    sizes = {name: len(cases(name)) for name in SETS}
    assert (sizes["forty"], sizes["masks"], sizes["small"]) == (40, 12, 24)
    assert len(cases()) == sum(sizes.values()), "each case is in one set"
    for name, case in cases().items():
        assert name == str(case)
        assert case.mod in KNOWN
        assert case.mod not in BY_BATCH or case.shape.batch <= ENTRIES
    assert {case.mod for case in cases("named", "masks").values()} <= set(KNOWN)
    decoding = [case for case in cases("small").values() if not case.training]
    assert len(decoding) == 12
    assert all(case.shape.length <= 16 < 4096 <= case.shape.kv_length for case in decoding)
    for inside in (False, True):
        short = [case for case in cases("small").values() if case.training and case.inside == inside]
        assert {case.shape.length for case in short} == {128, 256, 512, 1024}


def test_cases_by_set_or_name():
    assert next(iter(cases(LAST, "masks", FRAMES))) == LAST
    assert len(cases(LAST, "masks", FRAMES)) == 13
    with pytest.raises(ValueError, match=r"no set of cases is named 'rows'; there are named, forty, masks, small, and"):
        cases("masks", "rows")


def test_tiny_forms_are_for_a_cpu():
    for case in cases(tiny=True).values():
        shape = case.shape
        assert (case.device, case.training) == ("cpu", False)
        assert shape.length <= shape.kv_length <= 128
        assert shape.heads % shape.kv_heads == 0


def test_directions_have_the_names_of_the_engine():
    assert {direction for of in LISTS.values() for direction in of} == {FORWARD, BACKWARD}


def contender(milliseconds, ran, **more):
    return Contender(ran, milliseconds=milliseconds, spread=0.1, **more)


def result(default=(2.0, "native + native"), case="a case", **others):
    found = {DEFAULT: contender(*default), STOCK: contender(3.0, STOCK), "dense": Contender(why="BIAS_BUDGET: 512 MiB")}
    return Result(case, found | {name: contender(*given) for name, given in others.items()})


@pytest.mark.parametrize(
    ("others", "best", "regret", "speedup"),
    [
        ({}, DEFAULT, 1.0, 1.5),
        ({"chained": (1.0, "chained + chained")}, "chained", 2.0, 1.5),
        ({"chained": (2.5, "chained + chained")}, DEFAULT, 1.0, 1.5),
        ({"native": (1.5, "native + native")}, DEFAULT, 1.0, 2.0),
        ({"native": (1.0, "native + native"), "parts": (1.6, "parts + parts")}, DEFAULT, 1.0, 3.0),
        ({"native": (1.5, "native + native"), "parts": (1.2, "parts + parts")}, "parts", 1.25, 2.0),
    ],
)
def test_the_best_is_another_way_that_is_faster(others, best, regret, speedup):
    """A way that runs as the default does is the default, and the less of both times is that of the plans."""
    found = result(**others)
    assert (found.best, found.regret, found.speedup) == (best, regret, speedup)


def test_a_call_that_is_kept_runs_as_inductors():
    found = result(default=(3.1, STOCK))
    assert (found.best, found.regret, found.speedup) == (DEFAULT, 1.0, 1.0)
    found = result(default=(3.0, STOCK), graphs=(2.0, "native + native"))
    assert (found.best, found.regret, found.speedup) == ("graphs", 1.5, 1.0)


def test_the_mean_is_geometric_and_the_worst_is_named():
    found = [result(), result(case="another", chained=(0.5, "chained"))]
    mean, worst, least = summary(found)
    assert mean == "default / best over 2 cases: geometric mean 2.000"
    assert worst.startswith("worst: 4.00, another: default 2.000 ms (native + native), chained 0.500 ms")
    assert least.startswith("least inductor / default: 1.50, a case")


def test_where_inductor_has_no_kernel():
    found = result()
    found.contenders[STOCK] = Contender(why="RuntimeError: out of resource: shared memory")
    assert math.isnan(found.speedup)
    assert len(summary([found])) == 2


def test_the_table_says_why_and_what_was_predicted():
    found = result(tile_lists=(1.0, "tile_lists + tile_lists", ))
    found.contenders["tile_lists"].predicted = 0.75
    console = Console(width=180, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show([found], console, "a GPU")
    text = console.export_text()
    for wanted in ("2.00", "1.50", "dense: BIAS_BUDGET: 512 MiB", "tile_lists 1.000 (0.750)", "geometric mean"):
        assert wanted in text, text


def test_a_file_gives_back_what_was_measured_on_such_a_machine(tmp_path):
    path = tmp_path / "regret.csv"
    assert read_csv(path, "a GPU") == []
    found = [result(chained=(1.25, "chained + chained")), result(case="another")]
    write_csv(found, path, "a GPU")
    assert list(map(str, read_csv(path, "a GPU"))) == list(map(str, found))
    assert read_csv(path, "another GPU") == []
    path.write_text("shape,mod\n")
    with pytest.raises(ValueError, match="is no file of --regret"):
        read_csv(path, "a GPU")


def test_results_go_between_processes():
    found = result(chained=(1.25, "chained + chained"))
    assert str(Result.of(json.loads(json.dumps(dataclasses.asdict(found))))) == str(found)


def test_contenders_are_compiled_beside_others_and_measured_alone(tmp_path, monkeypatch):
    """Each that can run is, and the others say why; the default is compiled again, with no times of before."""
    told, order, measured = {}, [], worker.times_of
    (tmp_path / "plan").write_text("of a process that was not alone")
    worker.engine.times.put("kernel times", (1.0,))

    @contextlib.contextmanager
    def alone():
        order.append("alone")
        yield

    def times_of(case, functions, *how, **more):
        assert order == ["alone"]
        assert not tmp_path.exists()
        assert worker.engine.times.get("kernel times") is None
        return measured(case, functions, *how, **more)

    monkeypatch.setattr(worker, "times_of", times_of)
    broken = dataclasses.replace(cases(LAST, tiny=True)[LAST], mod="nothing")
    given = {**cases(FRAMES, INSIDE, tiny=True), "broken": broken}
    worker.measure(given, 2, alone, tmp_path, lambda name, found: told.update({name: found}))
    assert told["broken"].startswith("ValueError: no mod is named 'nothing'")
    found = told[FRAMES].contenders
    assert next(iter(found)) == DEFAULT
    assert set(found) == {DEFAULT, *FORCED} - {"tile_lists_forward", "tile_lists_backward"}
    ran = {name for name, contender in found.items() if contender.milliseconds > 0}
    assert ran == {DEFAULT, STOCK, "graphs", "chained", "dense", "parts"}
    assert found["native"].why.endswith("options have strategy='native': native takes plain scores and bounds only")
    assert found["tile_lists"].why.startswith("DEVICE: no kernels by tile lists")
    assert found[DEFAULT].ran == found["graphs"].ran == "chained"
    assert found[DEFAULT].predicted == found["graphs"].predicted > 0
    assert found[STOCK].predicted > 0
    found = told[INSIDE].contenders
    assert [found[name].ran for name in (DEFAULT, STOCK, "chained")] == ["native", STOCK, "chained"]
    assert all(found[name].milliseconds > 0 for name in (DEFAULT, STOCK, "chained"))


@pytest.mark.parametrize("training", [True, False])
def test_predictions_are_of_the_contender_of_that_name(training):
    case = dataclasses.replace(next(iter(cases(CAUSAL).values())), training=training)
    directions = [*LISTS.values()] if training else [(FORWARD,)]
    found = [worker._strategy_of(worker.name_of(of), case) for of in directions]
    assert found == (list(LISTS) if training else ["tile_lists"])
    assert [worker._strategy_of(name, case) for name in ("graphs", STOCK)] == ["graphs", STOCK]


def test_the_command_in_processes_of_its_own_goes_on_where_it_ended(tmp_path, capsys, monkeypatch):
    path = tmp_path / "regret.csv"
    how = ["--tiny", "--repeats", "2", "--csv", str(path)]
    assert main(["bench", "--regret", CAUSAL, LAST, "--at-once", "2", *how]) == 0
    assert "default / best over 2 cases: geometric mean" in capsys.readouterr().out
    with open(path) as file:
        lines = file.read().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    monkeypatch.setattr(Processes, "run", lambda *given: pytest.fail("it is measured already"))
    assert main(["bench", "--regret", CAUSAL, LAST, *how]) == 0
    with open(path) as file:
        assert sorted(file.read().splitlines()) == sorted(lines)


def test_what_fails_is_told_of_and_costs_no_other(tmp_path, capsys, monkeypatch):
    def run(self, given, environment, log):
        into = given[given.index("--into") + 1]
        with open(into, "w") as file:
            print(json.dumps(dataclasses.asdict(result(case=CAUSAL))), file=file)
            print(json.dumps({"case": LAST, "failed": "RuntimeError: no memory"}), file=file)
        assert environment["CUDNN_FLEX_CACHE_DIR"].startswith(str(into.rpartition("/")[0]))
        return "exit code -11\nCUDA error"

    monkeypatch.setattr(Processes, "run", run)
    assert main(["bench", "--regret", CAUSAL, LAST, FRAMES, "--tiny", "--at-once", "1"]) == 1
    printed = capsys.readouterr()
    assert f"{LAST} failed: RuntimeError: no memory" in printed.err
    assert f"{FRAMES} failed: its process ended" in printed.err
    assert printed.err.count("exit code -11\nCUDA error") == 1
    assert "over 1 cases" in printed.out
    monkeypatch.setattr(Processes, "run", lambda *given: ENDED)
    assert main(["bench", "--regret", CAUSAL, "--tiny"]) == 1


@pytest.mark.parametrize(
    ("arguments", "what"), [(["x"], "no set of cases is named 'x'"), (["masks", "--csv", "none/x.csv"], "no folder")]
)
def test_wrong_usage(arguments, what, capsys):
    assert main(["bench", "--regret", *arguments, "--tiny"]) == 2
    assert what in capsys.readouterr().err


def test_processes_are_as_many_as_there_are_cores_but_one(monkeypatch):
    for cores, wanted in ((None, 1), (1, 1), (2, 1), (8, 7), (16, command.MOST), (128, command.MOST)):
        monkeypatch.setattr(command.os, "cpu_count", lambda cores=cores: cores)
        assert command._side_by_side() == wanted
