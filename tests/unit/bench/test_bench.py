"""The benchmark, on a clock of its own: what is compiled, which samples count, and what tables, files and plots hold.

Knows nothing of speed: the functions are stand-ins, or run on the CPU.
"""

import contextlib
import csv
import math
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from rich.console import Console

from cudnn_flex_compile.bench import case as cases
from cudnn_flex_compile.bench import command, measure
from cudnn_flex_compile.bench.case import OURS, SDPA, STOCK, Case, Layer, Shape, named, read_by_mask
from cudnn_flex_compile.bench.measure import BACKWARD, BOTH, FORWARD, PARTS, WARM_UP, Result, Time
from cudnn_flex_compile.bench.mods import ALL, EIGHT, FIVE, KNOWN
from cudnn_flex_compile.bench.show import plot, table, write_csv
from cudnn_flex_compile.cli import main
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.report.report import CallReport

SHAPE = Shape(1, 2, 1, 16, 8)


def my_score_mod(score, b, h, q, kv):
    return score * 2


def my_mask_mod(b, h, q, kv):
    return q >= kv


def my_factory(heads, length, device):
    return my_score_mod, my_mask_mod


def of_two(a, b):
    return a


def test_a_shape():
    assert Shape.parse("2,32,8,4096,128") == Shape(2, 32, 8, 4096, 128)
    assert str(Shape(2, 32, 8, 4096, 128)) == "2,32,8,4096,128"
    assert [str(Shape.parse(text)) for text in EIGHT] == list(EIGHT)


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,x", "1,3,2,16,8", "0,2,1,16,8", "1,2,1,16,8,9"])
def test_what_is_no_shape(text):
    with pytest.raises(ValueError, match=r"B,H,HKV,S,D.*got"):
        Shape.parse(text)


def test_functions_of_a_user():
    assert named(f"{__name__}:my_score_mod")(2, 16, "cpu") == (my_score_mod, None)
    assert named(f"{__name__}:my_mask_mod")(2, 16, "cpu") == (None, my_mask_mod)
    assert named(f"{__name__}:my_factory")(2, 16, "cpu") == (my_score_mod, my_mask_mod)


@pytest.mark.parametrize(
    ("mod", "what"),
    [
        ("nothing", "no mod is named 'nothing'; there are 'full'"),
        ("no.such:thing", "cannot be imported"),
        (f"{__name__}:nothing", "cannot be imported"),
        (f"{__name__}:of_two", "takes 2 arguments"),
    ],
)
def test_what_is_no_mod(mod, what):
    with pytest.raises(ValueError, match=what):
        named(mod)


@pytest.mark.parametrize("name", KNOWN)
def test_every_named_mod_can_be_called(name):
    score_mod, mask_mod = KNOWN[name](4, 32, "cpu")
    b, h, q, kv = (torch.tensor(i) for i in (1, 2, 9, 5))
    assert score_mod or mask_mod or name == "full"
    assert score_mod is None or score_mod(torch.tensor(0.5), b, h, q, kv).shape == ()
    assert mask_mod is None or mask_mod(b, h, q, kv).dtype == torch.bool


def test_the_spread_is_half_the_distance_of_the_quartiles():
    assert Time.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == Time(4.0, 2.0)
    assert Time.of([3.0]).median == 3.0


class Clock:
    """Ours takes 1 ms a call forward and 3 backward, the others twice that; samples that do not count take a second."""

    def __init__(self, functions):
        self.functions, self.running, self.samples = functions, None, 0

    def __call__(self, run):
        before = dict(self.functions.calls)
        result = run()
        ran = [name for name, count in self.functions.calls.items() if count > before.get(name, 0)]
        self.running = ran[0] if ran else self.running
        count = self.functions.calls[self.running] - before.get(self.running, 0)
        self.samples += 1
        part = FORWARD if count and result is not None else BOTH if count else BACKWARD
        each = {FORWARD: 1.0, BACKWARD: 3.0, BOTH: 4.0}[part] * (1 if self.running == OURS else 2)
        return each * self.functions.layers(run, result), result


class Functions:
    """Stand-ins for the contenders, which count their calls."""

    def __init__(self):
        self.calls, self.last = {}, 1

    def __call__(self, mode=None, with_sdpa=True):
        return {name: self.function(name) for name in (STOCK, OURS, *((SDPA,) if with_sdpa else ()))}

    def function(self, name):
        def call(q, k, v):
            self.calls[name] = self.calls.get(name, 0) + 1
            return q + k.sum() + v.sum()

        return call

    def layers(self, run, result):
        self.last = len(result) if isinstance(result, list) else self.last
        return self.last


@pytest.fixture
def measured(monkeypatch):
    functions = Functions()
    monkeypatch.setattr(Case, "functions", lambda self, *how: functions(*how))
    monkeypatch.setattr(measure, "first_calls", lambda *arguments: CallReport("here", strategies=("native", "native")))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    case = Case("causal", SHAPE, device="cpu")
    return lambda mode=None: measure.measure(case, 5, mode, clock=Clock(functions)), functions


def test_medians_by_contender_and_part(measured):
    run, _ = measured
    result = run()
    assert result.contenders == [STOCK, OURS, SDPA]
    for part, ours in ((FORWARD, 1.0), (BACKWARD, 3.0), (BOTH, 4.0)):
        assert result.times[OURS, part].median == pytest.approx(ours)
        assert result.ratio(part) == result.ratio(part, SDPA) == pytest.approx(2.0)


def test_samples_grow_once_it_is_known_how_long_a_call_takes(measured):
    run, functions = measured
    run()
    layers = round(measure.LONGEST / 8)  # the last contender takes 8 ms a call
    few, many = WARM_UP - 2, 5 + 2
    assert functions.calls[OURS] == 2 * (few + many * layers)


def test_under_cuda_graphs_a_sample_is_one_call(measured):
    run, functions = measured
    result = run("reduce-overhead")
    assert {part for _, part in result.times} == {BOTH}
    assert functions.calls[OURS] == WARM_UP + 5


def test_calls_are_compiled_by_both_backends_on_the_cpu():
    case = Case("soft cap + causal", SHAPE, device="cpu", options={"lower": "always", "inner_backend": "aot_eager"})
    functions = case.functions(with_sdpa=True)
    assert list(functions) == [STOCK, OURS]
    layer = Layer(tuple(t.detach() for t in case.layer().qkv), case.layer().grad)
    with torch.no_grad():
        call = cases.first_calls(case, functions, lambda function, layers: function(*layer.qkv))
        outs = [function(*layer.qkv) for function in functions.values()]
    assert call.strategies == ("chained",)
    assert outs[0].shape == layer.qkv[0].shape
    torch.testing.assert_close(*outs, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("mod", [*cases.SDPA_ARGUMENTS, "sliding window", "documents", "padded lengths"])
def test_sdpa_computes_the_same(mod):
    shape = SHAPE if mod in cases.SDPA_ARGUMENTS else Shape(1, 2, 2, 16, 8)
    case = Case(mod, shape, torch.float32, device="cpu")
    layer = case.layer()
    score_mod, mask_mod = ALL[mod](2, 16, "cpu")
    from tests.support.dense import attention

    q, k, v = (t.transpose(1, 2) for t in layer.qkv)
    expected, _ = attention(q, k, v, score_mod, mask_mod, 8**-0.5, True)
    found = case._sdpa(case.sdpa_arguments())(*layer.qkv).transpose(1, 2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mod", "shape"),
    [("soft cap", SHAPE), ("prefix-LM", Shape(1, 2, 1, 16, 8)), ("prefix-LM", Shape(1, 2, 2, 16384, 8))],
)
def test_where_sdpa_has_no_kernel(mod, shape):
    """A score_mod; and under a mask that is a tensor grouped queries, and long sequences."""
    assert Case(mod, shape, device="cpu").sdpa_arguments() is None


def test_an_sdpa_that_fails_is_left_out(monkeypatch):
    def broken(q, k, v):
        raise torch.OutOfMemoryError("no 64 GiB")

    functions = {OURS: torch.compile(lambda q, k, v: q, backend="eager"), SDPA: broken}
    reports = iter([CallReport("here", strategies=("native",))])
    monkeypatch.setattr(cases, "collect", lambda: contextlib.nullcontext(SimpleNamespace(calls=list(reports))))
    case = Case("causal", SHAPE, device="cpu")
    cases.first_calls(case, functions, lambda function, layers: function(*layers[0].qkv))
    assert list(functions) == [OURS]
    with pytest.raises(torch.OutOfMemoryError):
        cases.first_calls(case, {OURS: broken}, lambda function, layers: function(*layers[0].qkv))


def results():
    found = []
    for mod, length, factor in (("full", 512, 2.0), ("full", 1024, 1.0), ("causal", 512, 0.5), ("causal", 1024, 4.0)):
        times = {(name, part): Time(2.0, 0.25) for name in (STOCK, OURS) for part in PARTS}
        times |= {(STOCK, part): Time(2.0 * factor, 0.5) for part in PARTS}
        if mod == "causal":
            times |= {(SDPA, part): Time(1.5, 0.1) for part in PARTS}
        reason = Reason(Code.SLOWER, "by far") if factor < 1 else None
        call = CallReport("here", strategies=() if reason else ("native", "native"), reason=reason)
        found.append(Result(Case(mod, Shape(1, 2, 1, length, 8)), call, times))
    return found


def test_the_table():
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(results()))
    text = console.export_text()
    for wanted in ("4.000 ± 0.500 / 2.000 ± 0.250", "2.00x", "0.50x", "SDPA 1.500", "kept: SLOWER", "1.41x"):
        assert wanted in text


def test_the_mean_is_geometric():
    assert measure.mean(results(), BOTH) == pytest.approx(math.sqrt(2))


def test_the_file(tmp_path):
    write_csv(results(), tmp_path / "times.csv")
    with open(tmp_path / "times.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["shape"] for row in rows] == ["1,2,1,512,8", "1,2,1,1024,8"] * 2
    assert rows[0]["inductor_fwd_ms"] == "4.0000"
    assert rows[0]["sdpa_both_ms"] == ""
    assert rows[2]["sdpa_both_spread_ms"] == "0.1000"
    assert rows[3]["both_x"] == "4.000"
    assert {row["dtype"] for row in rows} == {"bfloat16"}


def test_the_plot(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    for count in (2, 4):  # one length, and two
        chosen = results()[::2] if count == 2 else results()
        plot(chosen, tmp_path / f"{count}.png")
        assert (tmp_path / f"{count}.png").read_bytes()[:4] == b"\x89PNG"


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench"]) == 1
    assert "no NVIDIA GPU here" in capsys.readouterr().err


def test_a_case_that_fails_costs_no_other(capsys, monkeypatch, tmp_path):
    """What was measured is in the file, and the exit code says that something is missing."""
    good = results()

    def measure_or_fail(case, *how):
        if case.mod == "soft cap":
            raise RuntimeError("CUDA error: an illegal memory access\nand more")
        return next(r for r in good if r.case.mod == case.mod)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)  # builds with CUDA look at the devices
    monkeypatch.setattr(command, "measure", measure_or_fail)
    path = tmp_path / "times.csv"
    assert main(["bench", "--mods", "soft cap", "full", "causal", "--csv", str(path)]) == 1
    printed = capsys.readouterr()
    assert "soft cap at 2,16,16,4096,128 failed: RuntimeError: CUDA error: an illegal memory access\n" in printed.err
    assert "geometric mean" in printed.out
    with open(path) as file:
        assert [row["mod"] for row in csv.DictReader(file)] == ["full", "causal"]
    assert main(["bench", "--mods", "full", "causal"]) == 0
    assert main(["bench", "--mods", "soft cap"]) == 1


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--mods", "x"], "no mod is named 'x'"),
        (["--shapes", "1"], "got '1'"),
        (["--csv", "none/times.csv"], "there is no folder"),
        (["--plot", "none/times.png"], "there is no folder"),
        (["--mods", "padded lengths", "--shapes", "9,2,2,16,8"], "at most 8 batch entries, not of 9"),
    ],
)
def test_wrong_usage(arguments, what, capsys):
    assert main(["bench", *arguments]) == 2
    assert what in capsys.readouterr().err


def test_forty_cases_and_their_shares():
    class Given:
        forty, dtype, lower, mods, shapes, deterministic = True, "bf16", "always", None, None, False

    found = command.cases_of(Given)
    assert len(found) == 40 == len({(c.mod, c.shape) for c in found})
    assert {c.mod for c in found} == set(FIVE)
    parts = [command.share(found, f"{i}/7") for i in range(7)]
    assert sorted(id(c) for part in parts for c in part) == sorted(map(id, found))
    Given.deterministic = True
    both = command.cases_of(Given)
    assert [c for c in both if not c.deterministic] == found
    assert [replace(c, deterministic=False) for c in both if c.deterministic] == found


def test_the_price_of_deterministic_algorithms(capsys, monkeypatch):
    """Each case is measured with its algorithms, and the table says how many times as long our calls take then."""
    good, seen = {r.case.mod: r for r in results()}, []

    def measure_slower(case, *how):
        exact = torch.are_deterministic_algorithms_enabled()
        seen.append((case.mod, exact, case.deterministic))
        times = {key: Time(t.median * (1.25 if exact else 1.0), t.spread) for key, t in good[case.mod].times.items()}
        return replace(good[case.mod], case=case, times=times)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(command, "measure", measure_slower)
    assert main(["bench", "--mods", "full", "causal", "--deterministic"]) == 0
    assert seen == [(mod, how, how) for mod in ("full", "causal") for how in (False, True)]
    assert not torch.are_deterministic_algorithms_enabled()
    printed = capsys.readouterr().out
    assert printed.count("1.25 times") == 2 * len(PARTS)
    assert "deterministic" in printed


def test_help_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, cudnn_flex_compile.cli as c\ntry: c.main(['bench', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("inside", [False, True])
def test_a_renewed_case_has_a_new_mask_at_each_call(inside):
    case = Case("documents", Shape.parse("2,2,2,128,16"), device="cpu", training=False, renewed=True, inside=inside)
    call = case.call("a call")
    (ids,) = read_by_mask(call)
    assert ids.shape == (128,)
    function = case.compiled_by("eager", "another")
    layer = case.layer()
    seen = []
    with mock.patch.object(torch.autograd.graph, "increment_version", seen.append):
        outs = [function(*layer.qkv) for _ in range(2)]
    assert [t.shape for t in seen] == [(128,)] * 2
    assert torch.equal(*outs)
    case.renewed = False
    assert case.compiled_by("eager", "one more")(*layer.qkv).shape == outs[0].shape
