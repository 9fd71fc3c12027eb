"""What a report shows of each call: source, picture, errors, what is expected; as text, JSON and PNG."""

import inspect
import json
import re
import textwrap

import pytest
import torch
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention

from cudnn_flex_compile import collect, explain
from cudnn_flex_compile.config import Options
from cudnn_flex_compile.engine.problem import Error
from cudnn_flex_compile.passes import describe
from cudnn_flex_compile.passes.decide import device_times
from cudnn_flex_compile.passes.lower_graph import lower_calls
from cudnn_flex_compile.passes.read.mask_picture import UNKNOWN
from cudnn_flex_compile.report.call import Contender
from cudnn_flex_compile.report.picture import Picture
from cudnn_flex_compile.report.report import CallReport, Report
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.optable import make
from tests.support import details_mods as mods
from tests.support.details_mods import causal, soft_cap, window

EAGER = {"inner_backend": "eager", "lower": "always"}
ROWS, COLUMNS = 64, 128  # of a picture's cells: at these lengths there is one for each pair
DOCUMENTS = torch.arange(COLUMNS) // 48
PADDING = torch.arange(COLUMNS)[None] % torch.tensor([[3], [5]]) != 1
LENGTHS = torch.tensor([77, 30])
SLOPES = torch.tensor([0.5, 0.25])


def draw(length=ROWS, columns=COLUMNS):
    query, key, value = (torch.randn(2, 2, n, 16, dtype=torch.bfloat16) for n in (length, columns, columns))
    return query, key, value


def report_of(function, *args):
    with torch.no_grad():
        return explain(function, *args, options=EAGER)


def call_with(score_mod=None, mask_mod=None):
    mask = mask_mod and create_block_mask(mask_mod, 2, 2, ROWS, COLUMNS, device="cpu")
    report = report_of(lambda q, k, v: flex_attention(q, k, v, score_mod, mask), *draw())
    assert len(report.calls) == 1
    return report.calls[0]


def text_of(function):
    return textwrap.dedent(inspect.getsource(function)).rstrip()


WRITTEN = {
    "a function and its helper": (soft_cap, [soft_cap, mods.helper]),
    "a closure": (mods.alibi(SLOPES), [mods.alibi(SLOPES)]),
    "a method": (mods.Mods().plus_one, [mods.Mods.plus_one]),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_functions_as_they_are_written(name):
    function, expected = WRITTEN[name]
    call = call_with(function)
    assert sorted(call.score_source.split("\ndef ")) == sorted("\n".join(map(text_of, expected)).split("\ndef "))
    assert call.mask_source == ""


def test_composed_masks_show_each_function():
    assert call_with(mask_mod=and_masks(causal, window)).mask_source == f"{text_of(causal)}\n{text_of(window)}"


def test_lambdas():
    assert call_with(mods.triple).score_source == "lambda score, b, h, q, kv: score\n    * 3"
    assert call_with(mods.two).score_source.startswith("one, two = "), "which of the two is not known"


def test_long_functions_are_cut():
    lines = call_with(mods.long).score_source.splitlines()
    assert (lines[0], lines[-1].strip(), len(lines)) == ("def long(score, b, h, q, kv):", "...", 12)


def test_code_without_a_file():
    scope = {}
    exec("def double(score, b, h, q, kv): return score * 2", scope)
    assert call_with(scope["double"]).score_source == ""


def documents(b, h, q, kv):
    return DOCUMENTS[q] == DOCUMENTS[kv]


def padding(b, h, q, kv):
    return PADDING[b, kv]


def lengths(b, h, q, kv):
    return (q >= kv) & (kv < LENGTHS[b])


def per_head(b, h, q, kv):
    return kv <= q + h * 20


def dilated(b, h, q, kv):
    return (q - kv) % 3 == 0


MASKS = {
    causal: "", window: "", documents: "", dilated: "", padding: "batch entry 0", lengths: "batch entry 0",
    per_head: "head 0",
}  # fmt: skip


@pytest.mark.parametrize("mask_mod", MASKS, ids=lambda m: m.__name__)
def test_pictures_are_of_the_mask(mask_mod):
    picture = call_with(mask_mod=mask_mod).picture
    zero, q, kv = torch.zeros((), dtype=torch.int32), torch.arange(ROWS)[:, None], torch.arange(COLUMNS)
    expected = mask_mod(zero, zero, q, kv).expand(ROWS, COLUMNS)
    assert torch.equal(torch.tensor(picture.cells), expected.float())
    assert (picture.lengths, picture.of) == ((ROWS, COLUMNS), MASKS[mask_mod])


def test_a_mask_in_the_score_mod_is_shown():
    call = call_with(lambda score, b, h, q, kv: torch.where(q >= kv, score, float("-inf")))
    assert torch.equal(torch.tensor(call.picture.cells), torch.ones(ROWS, COLUMNS).tril())


def passed(function, *args):
    """The reports of the pass alone: nothing runs."""
    found = []

    def backend(graph_module, inputs):
        found.extend(lower_calls(graph_module, inputs, Options(tile_lists=False)))
        return lambda *_: (args[0],)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend)(*args)
    return found


def band(score, b, h, q, kv):
    return torch.where((q >= kv) & (q - kv < 8), score, float("-inf"))


@pytest.mark.parametrize("length", [1, 63, 1000, 20000])
def test_narrow_bands_are_seen_at_any_length(length):
    query = torch.zeros(1, 1, length, 16, dtype=torch.bfloat16)
    with collect():
        (call,) = passed(lambda q: flex_attention(q, q, q, band), query)
    assert (len(call.picture.cells), len(call.picture.cells[0])) == (min(length, 64), min(length, 128))
    assert all(any(row) for row in call.picture.cells)


def test_nothing_is_described_where_nobody_collects():
    (call,) = passed(lambda q: flex_attention(q, q, q, band), torch.zeros(1, 1, 64, 16, dtype=torch.bfloat16))
    assert (call.score_source, call.picture) == ("", "")


def test_no_picture_without_a_mask():
    assert call_with(soft_cap).picture == ""


def test_tensors_that_the_graph_computes_are_not_at_hand():
    def model(q, k, v, limits):
        ends = limits + 1
        return flex_attention(q, k, v, lambda s, b, h, i, j: torch.where(j < ends[b], s, float("-inf")))

    call = report_of(model, *draw(), LENGTHS).calls[0]
    assert (call.reason, call.picture) == (None, UNKNOWN)


@pytest.mark.parametrize("part", ["source_of", "sketch"])
def test_what_cannot_be_described_changes_nothing(part, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(describe, part, fail)
    call = call_with(soft_cap, causal)
    assert (call.reason, call.strategies) == (None, ("chained",))
    assert isinstance(call.picture, Picture) == (part == "source_of")
    assert bool(call.score_source) == (part == "sketch")


def test_what_is_expected():
    query = torch.zeros(1, 1, 4096, 16, dtype=torch.bfloat16)
    full, banded, short, made = (
        passed(function, tensor)[0].expected
        for function, tensor in (
            (lambda q: flex_attention(q, q, q), query),
            (lambda q: flex_attention(q, q, q, block_mask=CAUSAL), query),
            (lambda q: flex_attention(q, q, q), query[:, :, :2000]),
            (lambda q: flex_attention(q, q, q, block_mask=create_block_mask(causal, 1, 1, 4096, 4096, "cpu")), query),
        )
    )
    times = device_times.times_of(torch.device("cpu"))

    def gain(length):
        stock, ours = (times.rate(way, "forward", "plain", 16, length) for way in ("inductor", "native"))
        return stock / ours

    assert full == pytest.approx(gain(4096))
    blocks = 4096 // 128
    listed = blocks * (blocks + 1) / 2 / blocks**2
    visible = (4097 + 128) / 2 / 4096  # in whole tiles of 128
    assert banded == pytest.approx(gain(4096) * listed / visible, rel=1e-3)
    assert short == pytest.approx(gain(2000))
    assert made == pytest.approx(gain(4096), rel=1e-3)


CAUSAL = create_block_mask(causal, None, None, 4096, 4096, device="cpu")


@pytest.fixture(scope="module")
def report():
    mask = create_block_mask(documents, None, None, ROWS, COLUMNS, device="cpu")

    def model(q, k, v):
        for _ in range(12):
            q = flex_attention(q, k, v, soft_cap, mask)
        q = flex_attention(q, k, v, block_mask=mask)
        return flex_attention(q, k, v, lambda score, b, h, q, kv: torch.special.i0(score))

    return report_of(model, *draw())


def test_identical_layers_are_shown_once(report):
    rows = [line.split()[:2] for line in report.overview.splitlines() if re.match(r" *\d+ +x", line)]
    assert rows == [["1", "x12"], ["2", "x1"], ["3", "x1"]]


def test_shows_source_and_mask(report):
    shown = str(report)
    for line in (*text_of(soft_cap).splitlines(), *report.calls[0].picture.lines()):
        assert line in shown
    assert "same mask as 1" in shown
    assert "kept       UNKNOWN_OP" in shown
    assert "def soft_cap" not in report.overview


TIMES = (Contender("graphs", 1.0, won=True), Contender("inductor", 1.26))


def test_shows_what_was_measured():
    call = CallReport("?", report_program(), ("chained",), errors=(Error("out", 2.1e-3, 1.9e-3),), contenders=TIMES)
    shown = str(Report([call]))
    assert "out 2.1e-03 (1.9e-03)" in shown
    assert "about 1.3x as fast as Inductor" in shown
    assert "graphs 1.000 ms, inductor 1.260 ms, predicted, graphs won" in " ".join(shown.split())


def report_program():
    return ir.program(make("tanh", ir.SCORE))


def test_as_json(report):
    first, _, kept = (json.loads(json.dumps(report.to_dict()))["calls"][i] for i in (0, 12, 13))
    assert first["score_source"].startswith("def ")
    assert first["picture"]["lines"] == report.calls[0].picture.lines()
    assert first["mask_bounds"] == "operand0[q, kv]"
    assert (first["errors"], first["expected"]) == ({}, report.calls[0].expected)
    assert (kept["score_source"], kept["picture"]) == (report.calls[13].score_source, None)
    call = CallReport("?", errors=(Error("dQ", 2.0, 1.0),))
    assert call.to_dict()["errors"] == {"dQ": {"found": 2.0, "stock": 1.0}}


def test_plots_each_distinct_mask(report, tmp_path):
    assert report.plot(tmp_path / "masks.png") == 2
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")
    assert Report(report.kept).plot(tmp_path / "none.png") == 0
    assert not (tmp_path / "none.png").exists()
    with pytest.raises(ValueError, match="supported formats"):
        report.plot(tmp_path / "masks.nothing")
