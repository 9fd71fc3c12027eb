"""The rows of real configurations, in their tiny form: what their calls become, and that both sides agree."""

import csv
import dataclasses
import json
import random
import sys
import threading
import time

import pytest
import torch
from rich.console import Console
from torch.nn.attention.flex_attention import create_mask

from cudnn_flex_compile import inductor_seam, uninstall
from cudnn_flex_compile.bench.command import facts
from cudnn_flex_compile.bench.rows import command, masks
from cudnn_flex_compile.bench.rows.launch import OURS, SIDES, STOCK
from cudnn_flex_compile.bench.rows.measure import IN_A_ROW, WARM_UP, Bench, _compare, is_attention, measure
from cudnn_flex_compile.bench.rows.result import Measured, Result, read_csv, write_csv
from cudnn_flex_compile.bench.rows.row import FORMS, LAYERS
from cudnn_flex_compile.bench.rows.rows import ROWS, chosen
from cudnn_flex_compile.bench.rows.show import calls, plot, table
from cudnn_flex_compile.bench.turns import compiling
from cudnn_flex_compile.cli import main

pytestmark = pytest.mark.any_torch
CALLS = {"3b": 2, "4a": 2, "9a": 2, "9b": 2, "9c": 2}  # compiled; of all others one
STEPS = 1 + WARM_UP + IN_A_ROW + 1
TESTED = [row for row in ROWS if row.name != "4b"]  # in the tiny form, the same as 4a


@pytest.mark.parametrize("row", TESTED, ids=lambda row: row.name)
def test_a_row_in_its_tiny_form(row, trainable, kernel_calls, monkeypatch):
    """Calls of all layers run on our op, and output and gradients are stock's. Where Inductor compiles whole layers
    for several lengths, which takes long, it is one layer, and does not train.
    """
    monkeypatch.setattr("cudnn_flex_compile.bench.rows.measure.of_transformers", lambda *_: None)
    whole = row.form == LAYERS
    layers = 1 if whole else 2
    found = measure(Bench(row.tiny(), layers, "cpu", {"lower": "always"}, trains=not whole), steps=1)
    assert (found.lowered, found.kept) == (CALLS.get(row.name, 1), {})
    steps = layers * (STEPS + (row.before is not None))
    again = 2 if row.checkpoint == "full" and not whole else 1
    assert kernel_calls == {"forward": again * steps} | ({} if whole else {"backward": steps})
    assert found.out < 0.01
    assert found.gradient < 0.03, found.worst
    assert inductor_seam.installed() is None
    assert all(len(side.steps) == 1 for side in found.sides.values())


@pytest.mark.parametrize("row", chosen(["9a", "9c"]), ids=lambda row: row.name)
def test_a_model_of_transformers(row, trainable):
    pytest.importorskip("transformers")
    found = measure(Bench(row.tiny(), 2, "cpu", {"lower": "always"}, trains=False), steps=0)
    assert (found.layers, found.lowered, found.kept) == ("transformers", 2, {})
    assert found.out < 0.01


def test_gradients_of_a_module_are_compared_together():
    """A bias of keys, whose gradient is rounding alone, is small beside the gradient of its weights."""
    stock = {"out": torch.ones(4), "key.weight": torch.full((4, 4), 3.0), "key.bias": torch.full((4,), 1e-3)}
    ours = {**stock, "key.bias": -stock["key.bias"]}
    found = Result("1a", "", {})
    _compare(found, [stock, ours])
    assert (found.out, found.worst) == (0.0, "key")
    assert found.gradient == pytest.approx(2e-3 * 2 / (3.0 * 4), rel=1e-3)
    _compare(found, [stock, {**ours, "out": torch.full((4,), 1.5), "key.weight": torch.zeros(4, 4)}])
    assert (found.out, found.gradient) == (pytest.approx(0.5), pytest.approx(1.0))


def test_rows_are_chosen_by_number_or_name():
    assert [row.name for row in chosen(["4", "3b"])] == ["3b", "4a", "4b"]
    assert chosen([]) == list(ROWS)
    assert [chosen([row.name]) for row in ROWS] == [[row] for row in ROWS]
    assert {row.form for row in ROWS} == set(FORMS)
    assert {row.name.rstrip("abcd") for row in ROWS} == {str(i) for i in range(1, 10)}
    with pytest.raises(ValueError, match=r"no row is named 'x', '10'; there are 1a, 1b"):
        chosen(["x", "1", "10"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_masks_differ_by_step(row):
    """Each hides something, and few queries see nothing: those of padding, under a window."""
    tiny = row.tiny()
    drawn = [tiny.draw(tiny, random.Random(seed)) for seed in (0, 1)]
    for data in drawn:
        for mod in tiny.mods(tiny, data):
            mask = create_mask(mod, tiny.batch, 1, tiny.length, tiny.kv_length, device="cpu")
            assert mask.any(-1).float().mean() > 0.6
            assert not mask.all()
    if not row.static:
        assert any(not torch.equal(a, b) for a, b in zip(drawn[0].values(), drawn[1].values(), strict=True))


def test_documents_have_the_lengths_of_real_ones():
    sizes = masks.lengths(8192, 512, 2730, random.Random(0))
    assert sum(sizes) == 8192
    assert all(512 <= size <= 2730 for size in sizes[:-1])


@pytest.mark.parametrize(
    ("kernel", "wanted"),
    [
        ("triton_tem_fused_flex_attention_0", True),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_128x128x128", True),
        ("kernel_cutlass_kernel_flash_attn_fwd", True),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTN", False),
        ("void at::native::elementwise_kernel<128, 4>", False),
        ("triton_poi_fused_mul_silu_0", False),
    ],
)
def test_kernels_of_attention_by_name(kernel, wanted):
    assert is_attention(kernel) is wanted


def result(name="1a", factor=2.0, **other):
    sides = {
        STOCK: Measured(20.0, [4.0 * factor] * 3, 3.0, 9.0, 100.0, {"triton_tem": 1.0}),
        OURS: Measured(10.0, [4.0], 1.0),
    }
    return Result(name, "", sides, 1, ["chained"], {"SLOWER": 2}, **other)


def test_the_table_and_the_file(tmp_path):
    found = [result(), result("9a", 0.5, gradient=0.5, worst="layers.0.query.weight")]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(found, kernels=True))
    text = console.export_text()
    for wanted in ("2.00x", "0.50x", "1.00x", "3.00x", "transformers is not installed", "0.5000", "triton_tem"):
        assert wanted in text
    assert calls(found[0]) == "1 lowered: chained\n2 kept: SLOWER"
    write_csv(found, tmp_path / "rows.csv", "a GPU")
    with open(tmp_path / "rows.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step_x"] for row in rows] == ["2.000", "0.500"]
    assert {f"step_{name}" for name in SIDES} <= set(rows[0])


def test_what_a_file_keeps_comes_back(tmp_path):
    """All but the kernels, and of the steps their median; nothing of another machine."""
    found, path = [result(), result("9a", 0.5, gradient=0.5, worst="layers.0.query.weight")], tmp_path / "rows.csv"
    write_csv(found, path, "a GPU")
    for wanted in found:
        for side in wanted.sides.values():
            side.steps, side.kernels = [side.step], {}
    assert read_csv(path, "a GPU") == found
    assert read_csv(path, "another GPU") == read_csv(tmp_path / "none.csv", "a GPU") == []
    (tmp_path / "other.csv").write_text("row,who\n")
    with pytest.raises(ValueError, match=r"is no file of --rows, whose columns are machine, row, who"):
        read_csv(tmp_path / "other.csv", "a GPU")


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    plot([result(), result("9a", 0.5)], tmp_path / "rows.png", "a GPU")
    assert (tmp_path / "rows.png").read_bytes()[:4] == b"\x89PNG"


def test_what_a_process_writes_comes_back():
    found = result(out=0.25)
    assert Result.of(json.loads(json.dumps(dataclasses.asdict(found)))) == found


def test_a_row_that_fails_costs_no_other(tmp_path, capsys, monkeypatch):
    def measured(row, given, folder, processes):
        return result(row.name) if row.name != "7" else "it has no GPU"

    monkeypatch.setattr(command, "_in_a_process", measured)
    path = tmp_path / "rows.csv"
    assert main(["bench", "--rows", "6", "7", "8", "--tiny", "--csv", str(path)]) == 1
    printed = capsys.readouterr()
    assert "geometric mean" in printed.out
    assert "row 7, causal video diffusion, failed: it has no GPU" in printed.err
    assert [found.row for found in read_csv(path, facts())] == ["6", "8"]


def test_rows_that_the_file_has_are_not_measured_again(tmp_path, capsys, monkeypatch):
    """The table shows those that were asked for, and the file keeps the others, too."""
    path, measured = tmp_path / "rows.csv", []
    write_csv([result("1a"), result("7")], path, facts())

    def measure_again(row, given, folder, processes):
        measured.append(row.name)
        return result(row.name)

    monkeypatch.setattr(command, "_in_a_process", measure_again)
    assert main(["bench", "--rows", "6", "7", "--tiny", "--csv", str(path)]) == 0
    assert measured == ["6"]
    assert [found.row for found in read_csv(path, facts())] == ["1a", "6", "7"]
    assert "geometric mean" in capsys.readouterr().out


def test_a_process_that_ends_badly_is_told_of(capsys, monkeypatch):
    monkeypatch.setattr(command.Processes, "run", lambda *_: "exit code 1\nCUDA error: an illegal memory access")
    assert main(["bench", "--rows", "7", "--tiny"]) == 1
    assert "row 7, causal video diffusion, failed: exit code 1\nCUDA error" in capsys.readouterr().err


def test_the_command_in_processes_of_its_own(capsys, tmp_path):
    path = tmp_path / "rows.csv"
    how = ["--layers", "1", "--steps", "1", "--lower", "always", "--at-once", "2", "--csv", str(path)]
    assert main(["bench", "--rows", "1a", "8", "--tiny", *how]) == 0
    assert "SpecForge" in capsys.readouterr().out
    found = read_csv(path, facts())
    assert [(each.row, calls(each)) for each in found] == [("1a", "1 lowered: chained"), ("8", "1 lowered: chained")]


def test_where_nothing_works_the_command_ends_early(capsys, monkeypatch, tmp_path):
    """Processes that are running are ended, and no other is started."""
    path = tmp_path / "started"

    def script(row, given, into):
        what = {"6": "import time; time.sleep(60)", "7": "raise SystemExit(7)"}.get(
            row.name, f"open({str(path)!r}, 'w')"
        )
        return [sys.executable, "-c", what]

    monkeypatch.setattr(command, "_command", script)
    start = time.monotonic()
    assert main(["bench", "--rows", "6", "7", "8", "--tiny", "--at-once", "2"]) == 1
    assert time.monotonic() - start < 30
    assert not path.exists()
    assert "row 7, causal video diffusion, failed: exit code 7" in capsys.readouterr().err


def test_one_measures_while_no_other_compiles(tmp_path):
    """The first waits with measuring until the second has compiled."""
    path, order = tmp_path / "turns", []

    def first():
        with compiling(path) as alone:
            begun.wait()
            with alone():
                order.append("first measures")

    def second():
        with compiling(path):
            begun.wait()
            time.sleep(0.3)
            order.append("second has compiled")

    begun = threading.Barrier(2)
    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == ["second has compiled", "first measures"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--rows", "x"], "no row is named 'x'"),
        (["--rows", "7"], "other.csv is no file of --rows"),
        (["--regret", "small"], "other.csv is no file of --regret"),
    ],
)
def test_wrong_usage(given, wanted, capsys, tmp_path):
    """A file that has something else stays as it is."""
    path = tmp_path / "other.csv"
    path.write_text("row,who\n")
    assert main(["bench", *given, "--csv", str(path)]) == 2
    assert wanted in capsys.readouterr().err
    assert path.read_text() == "row,who\n"


@pytest.fixture(autouse=True)
def nothing_installed():
    yield
    uninstall()
