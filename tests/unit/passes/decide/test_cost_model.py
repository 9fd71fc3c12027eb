"""Predicted times beside those that were measured, and the device's own table beside itself."""

import csv
import importlib.util
import json
import math
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cudnn_flex_compile.bench.mods import ALL
from cudnn_flex_compile.bench.regret.cases import chosen
from cudnn_flex_compile.passes.decide import cost_inputs, cost_model, device_times
from cudnn_flex_compile.passes.decide.chooser import PREDICTION_ERROR, choose
from cudnn_flex_compile.passes.decide.cost_inputs import Blocks, CostInputs, Looks, Workload
from cudnn_flex_compile.passes.decide.device_times import FOLDER, read
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32
from cudnn_flex_compile.scoremod.optable import make
from tests.support.docs_tables import DOCS
from tests.unit.passes.decide.test_chooser import CAPPED, CAUSAL

Q, KV = ir.index("q"), ir.index("k")
WINDOW = make("and", CAUSAL.mask, make("ge", KV + ir.const(1024, ir.I32), Q))
ALIBI = ir.SCORE + ir.cast(KV - Q, F32) * ir.operand(0, F32, "h")
MODS = {
    "full": ir.program(), "causal": CAUSAL, "soft cap + causal": CAPPED,
    "soft cap + window 1024": ir.program(CAPPED.score, WINDOW), "ALiBi + causal": ir.program(ALIBI, CAUSAL.mask),
}  # fmt: skip
MEASURED = [row for row in csv.DictReader((DOCS / "forty_h200.csv").open()) if int(row["shape"].split(",")[3]) >= 2048]


@pytest.fixture(autouse=True)
def h200(device_times, monkeypatch):
    monkeypatch.setattr(cost_inputs, "times_of", lambda device: TABLE)


TABLE = read(FOLDER / "NVIDIA_H200.json")


def call_of(batch, heads, kv_heads, length, dim, blocks=True):
    def tensor(count):
        shape = (batch, count, length, dim)
        return SimpleNamespace(shape=shape, device=torch.device("cuda"), dtype=torch.bfloat16)

    given = {"query": tensor(heads), "key": tensor(kv_heads), "value": tensor(kv_heads)}
    return SimpleNamespace(**given, blocks=("there",) if blocks else ())


def listed(mod, length):
    """The blocks of 128 x 128 that create_block_mask lists."""
    rows, seen = length // 128, 8 if "window" in mod else length
    count = sum(min(row, seen) + 1 for row in range(rows))
    edges = rows * (1 + (rows > seen))
    return Blocks(count / rows**2, edges / count)


def ratio(row):
    """How many times as fast as Inductor's kernel ours is, as predicted and as measured."""
    mod, shape = row["mod"], [int(n) for n in row["shape"].split(",")]
    blocks = None if mod == "full" else listed(mod, shape[3])
    hoisted = (SimpleNamespace(stored=torch.float32, learned=False),)
    inputs = CostInputs(call_of(*shape, mod != "full"), MODS[mod], hoisted, True, False, blocks, None)
    found = choose({(): inputs}, True, None, False).estimates
    predicted = found["inductor",].total / found[()].total
    return predicted, float(row["inductor_both_ms"]) / float(row["cudnn_flex_both_ms"])


def test_the_error_of_predictions_is_that_of_the_data():
    """Those of 30 calls that were measured as called, so that the host's time is in them."""
    errors = sorted(abs(math.log(predicted / measured)) for predicted, measured in map(ratio, MEASURED))
    assert len(errors) == 30
    assert errors[-2] < math.log(PREDICTION_ERROR)
    assert errors[-1] < math.log(PREDICTION_ERROR**2)


@pytest.mark.parametrize("cell", [c for c in TABLE.cells if len(TABLE.cells[c][0]) > 3], ids=str)
def test_lengths_between_those_of_the_table(cell):
    """Each rate is near that between its neighbours."""
    lengths, rates = TABLE.cells[cell]
    for i in range(1, len(lengths) - 1):
        ends = (lengths[i - 1], lengths[i + 1]), (rates[i - 1], rates[i + 1])
        assert abs(math.log(device_times._at(*ends, lengths[i]) / rates[i])) < math.log(PREDICTION_ERROR) / 2


BERT = Workload(products=73, tflop=2.8, calls=12)  # 12 layers of a width of 768, 16384 tokens
PADDING = ir.program(mask=make("gt", ir.operand(0, ir.I32, "b"), KV))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("partial", [0.2, 0.35])
def test_bert_with_padding_is_lowered(training, partial):
    """32 x 512, its 12 calls with one mask: attention takes 13.8 ms of a step by Inductor's kernel, and 3.3 by ours."""
    inputs = CostInputs(
        call_of(32, 12, 12, 512, 64), PADDING, (), training, False, Blocks(0.8, partial), BERT, sharing=12
    )
    found = choose({(): inputs}, True, None, False)
    assert found.order == ((),), found.slower


@pytest.mark.parametrize("share", [0.4, 0.45, 0.53], ids=["left", "middle", "right"])
def test_padding_on_either_side_runs_alike(share):
    """As layers of Llama have it: causal, some keys of each sequence hidden. The side changes the share of blocks."""
    around = Workload(products=29, tflop=7.0, calls=4)
    program = ir.program(mask=make("and", CAUSAL.mask, PADDING.mask))
    ways = {
        tiled: CostInputs(
            call_of(2, 32, 8, 4096, 128), program, (), True, False, Blocks(share, 0.1), around, tiled, sharing=32
        )
        for tiled in ((), ("forward", "backward"))
    }  # fmt: skip
    found = choose(ways, True, None, False)
    assert found.order[0] == ("forward", "backward"), found.slower


@pytest.mark.parametrize(
    ("looks", "lowered"),
    [(None, True), (Looks(2**28, True), True), (Looks(28 * 2**30, True), False), (Looks(2**30, False), False)],
)
def test_a_list_that_takes_long_each_step_keeps_its_calls(looks, lowered):
    """28 heads of 32768 tokens: its list may look at no pairs, at some, or at those of all heads."""
    reads, shape = ir.program(mask=make("ge", ir.operand(0, ir.I32, "q"), KV)), (1, 28, 4, 32768, 128)
    ways = {
        tiled: CostInputs(
            call_of(*shape), reads, (), True, False, Blocks(0.03, 0.5), None, tiled, sharing=4, looks=looks
        )
        for tiled in ((), ("forward", "backward"))
    }
    found = choose(ways, True, None, False)
    assert (found.order[:1] == (("forward", "backward"),)) == lowered, found.slower


def commands():
    """Those that are named beside the times of a step, and beside constants."""
    rows = json.loads(cost_model.STEP_TIMES.read_text())
    named = re.findall(r"\((cudnn-flex bench .+?|python3 -m .+?)\)", Path(cost_model.__file__).read_text())
    return [*(row["command"] for row in rows.values()), *named]


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_commands_exist(command):
    words = shlex.split(command.replace("CUDNN_FLEX_LOWER=always ", "").replace("\n#", ""))
    if words[0] == "python3":
        assert importlib.util.find_spec(words[2]) is not None
    else:
        assert words[:2] == ["cudnn-flex", "bench"]
        if words[2] == "--regret":
            assert chosen(words[3:], torch.bfloat16, tiny=False)
            return
        mods = words[words.index("--mods") + 1 : words.index("--lower")]
        assert mods
        assert set(mods) <= set(ALL)


def test_a_bound_that_is_read_lets_a_graph_skip_no_tiles():
    """Measured on an H200 (B 2, H 16, S 4096, D 128, right padding of 1/8 and 3/8): 1.62 ms, Inductor's kernel 1.40."""
    causal, end = make("ge", ir.index("q"), ir.index("k")), make("gt", ir.operand(0, ir.I32, "bq"), ir.index("k"))
    both = ir.program(mask=make("and", causal, end))
    for direction in ("forward", "backward"):
        assert cost_model.pairs_of(both, (4096, 4096), direction) == 4096 * 4096
        assert cost_model.pairs_of(ir.program(mask=causal), (4096, 4096), direction) < 0.6 * 4096 * 4096
