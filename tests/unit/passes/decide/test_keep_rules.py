"""The table of speed rules: each row keeps the calls that it is about, and names a command that exists."""

import importlib.util
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cudnn_flex_compile.bench.mods import ALL
from cudnn_flex_compile.passes.decide import cost_model
from cudnn_flex_compile.passes.decide.cost_model import Blocks, CostInputs, Workload
from cudnn_flex_compile.passes.decide.keep_rules import RULES, slower
from cudnn_flex_compile.reasons import Code
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32
from cudnn_flex_compile.scoremod.optable import make

CAUSAL = ir.program(mask=make("ge", ir.index("q"), ir.index("k")))
CAPPED = ir.program(make("tanh", ir.SCORE / 20.0) * 20.0, CAUSAL.mask)
PAIRS = ir.program(ir.SCORE + ir.operand(0, F32, "hqk"))
DISTANCE = ir.index("q") - ir.index("k")
BY_HEAD = ir.program(mask=make("ge", ir.operand(0, ir.I32, "bq"), ir.index("k") + ir.index("h")))
SHORT_ROWS = ir.program(mask=make("gt", ir.operand(0, ir.I32, "b"), ir.index("k")))
BUSY = Workload(products=17, tflop=0.4, calls=4)  # of 4 layers of a width of 1024, 4096 tokens
LLAMA = Workload(products=29, tflop=3.64, calls=4)  # of 4 layers of a width of 2048, 8192 tokens
LARGE, LITTLE = replace(BUSY, tflop=3.0), Workload(products=0, tflop=0.0, calls=1)
PADDED = {"program": SHORT_ROWS, "queries": 4096, "keys": 4096, "heads": 16, "share": 1.0, "around": LARGE}
DOCUMENTS = ir.program(mask=make("eq", ir.operand(0, ir.I32, "bq"), ir.operand(1, ir.I32, "bk")))
BOUNDED = ir.program(mask=make("and", CAUSAL.mask, make("ge", ir.index("k"), ir.operand(0, ir.I32, "bq"))))
STRIPED = ir.program(mask=make("eq", make("mod", DISTANCE, ir.const(3, ir.I32)), ir.const(0, ir.I32)))


def growing(length):
    """A number of keys that is another at each call."""
    return torch.SymInt(SimpleNamespace(hint=length))


def facts(queries=2048, keys=2048, training=True, device="cuda", program=CAUSAL, share=None, blocks=True, **more):
    dtype = more.pop("dtype", torch.bfloat16)

    heads = more.pop("heads", 4)

    def tensor(length):
        return SimpleNamespace(shape=(2, heads, length, 64), device=torch.device(device), dtype=dtype)

    given = {"query": tensor(queries), "key": tensor(keys), "value": tensor(keys)}
    call = SimpleNamespace(**given, blocks=("there",) if blocks else ())
    more = {"hoisted": (), "lse_gradient": False, "around": None, **more}
    listed = None if share is None else Blocks(share, 0.1)
    program = DOCUMENTS if more.get("tiled") and program is CAUSAL else program
    more["tiled"] = ("forward", "backward")[: 1 + training] if more.pop("tiled", False) else ()
    return CostInputs(call, program, training=training, blocks=listed, **more)  # pyright: ignore


def stored(dtype):
    return {"program": PAIRS, "hoisted": (SimpleNamespace(stored=dtype, learned=False),), "blocks": False}


KEPT = {
    "decoding, one more key at a time": (
        {"queries": 1, "keys": growing(4096), "training": False}, "building a plan for each number",
    ),
    "decoding, by tiles": (
        {"queries": 16, "keys": growing(4096), "training": False, "tiled": True}, "building a plan for each number",
    ),
    "a call of a model that keeps the host busy": (
        {"around": BUSY, "queries": 4096, "keys": 4096, "heads": 16, "share": 0.53}, "and may keep the host longer",
    ),
    "such a call in the forward": (
        {"around": BUSY, "queries": 4096, "keys": 4096, "heads": 16, "share": 0.53, "training": False},
        "and may keep the host longer",
    ),
    "the forward of a model whose steps keep the GPU busy": (
        {"around": LLAMA, "queries": 4096, "keys": 4096, "heads": 32, "share": 0.53, "training": False},
        "and may keep the host longer",
    ),
    "a short call beside little else": ({"around": LITTLE, "queries": 256, "keys": 256}, "about 0.00 ms"),
    "a loss of the LSE that spares the GPU little": (
        {"lse_gradient": True, "around": LITTLE, "queries": 4096, "keys": 4096, "heads": 16, "share": 0.53},
        "and may keep the host longer",
    ),
    "a padding mask, few layers": ({**PADDED, "sharing": 2}, "takes some time at each step, and 2 calls would spare"),
    "a padding mask that hides much": ({**PADDED, "share": 0.65, "sharing": 100}, "the BlockMask lists 65%"),
    "a loss of the LSE, few keys": ({"lse_gradient": True, "queries": 512, "keys": 512}, "256 keys to compute"),
    "a loss of the LSE, few blocks": ({"lse_gradient": True, "share": 0.43}, "1024 keys to compute"),
    "a loss of the LSE, fewer keys, a soft cap": (
        {"lse_gradient": True, "program": CAPPED, "queries": 129, "keys": 257}, "65 keys to compute",
    ),
    "a bias is read": (stored(torch.float32), "read from memory"),
    "a bias of bfloat16 in the forward": (stored(torch.bfloat16) | {"training": False}, "read from memory"),
    "blocks that are not known": ({"program": STRIPED}, "without tile skipping"),
    "fewer blocks": ({"share": 0.2}, "of the pairs, the BlockMask lists 20%"),
    "documents by bounds, a BlockMask that is not at hand": (
        {"program": BOUNDED, "queries": 8192, "keys": 8192, "heads": 32}, "is not at hand",
    ),
    "a list of tiles for one short call": ({"tiled": True, "share": 0.2}, "and 1 call would save"),
    "a list of tiles, blocks that are not known": ({"tiled": True}, "and 1 call would save"),
    "a list of tiles for layers that see little": (
        {"tiled": True, "queries": 8192, "keys": 8192, "share": 0.01, "sharing": 12}, "and 12 calls would save",
    ),
    "a list of tiles in a model that keeps the host busy": (
        {"tiled": True, "queries": 4096, "keys": 4096, "heads": 16, "share": 0.75, "sharing": 4, "around": BUSY},
        "save",
    ),
    "a list of tiles in a model of few layers": (
        {"tiled": True, "queries": 4096, "keys": 4096, "heads": 16, "share": 0.75, "sharing": 4, "around": LARGE},
        "save",
    ),
    "a list of tiles for each head": (
        {"tiled": True, "queries": 8192, "keys": 8192, "share": 0.2, "sharing": 12, "program": BY_HEAD}, "save",
    ),
}
LOWERED = {
    "known tile skipping": {},
    "a loss of the LSE": {"lse_gradient": True},
    "a loss of the LSE, known blocks": {"lse_gradient": True, "share": 0.53},
    "a loss of the LSE, few keys, a soft cap": {
        "lse_gradient": True, "program": CAPPED, "queries": 512, "keys": 512, "share": 0.6,
    },
    "as many blocks": {"share": 0.53},
    "decoding with gradients": {"queries": 16, "keys": growing(4096)},
    "more queries": {"queries": 17, "keys": growing(4096), "training": False},
    "decoding": {"queries": 1, "training": False},
    "any number of queries, few at first": {"queries": growing(8), "keys": growing(8), "training": False},
    "a short sequence by itself": {"queries": 128, "keys": 128},
    "a call of a model that keeps the GPU busy": {
        "around": LARGE, "queries": 4096, "keys": 4096, "heads": 16, "share": 0.53,
    },
    "such a call in the forward": {
        "around": LARGE, "queries": 4096, "keys": 4096, "heads": 16, "share": 0.53, "training": False,
    },
    "a call of a model whose forward may keep the host busy": {
        "around": LLAMA, "queries": 4096, "keys": 4096, "heads": 32, "share": 0.53,
    },
    "a soft cap in the forward of such a model": {
        "around": LLAMA, "program": CAPPED, "queries": 4096, "keys": 4096, "heads": 32, "share": 0.53,
        "training": False,
    },
    "a soft cap in a model that keeps the host busy": {
        "around": BUSY, "program": CAPPED, "queries": 4096, "keys": 4096, "heads": 16, "share": 0.53,
    },
    "a long call beside little else": {"around": LITTLE, "queries": 4096, "keys": 4096, "heads": 16, "share": 0.53},
    "a loss of the LSE, a soft cap": {
        "lse_gradient": True, "program": CAPPED, "around": BUSY, "queries": 4096, "keys": 4096, "heads": 16,
        "share": 0.53,
    },
    "a short call of a model, on the CPU": {"around": BUSY, "device": "cpu"},
    "a learned bias in a model that keeps the host busy": {
        "around": BUSY, "hoisted": (SimpleNamespace(learned=True, expression=ir.operand(0, F32, "h")),),
    },
    "a padding mask, four layers": {**PADDED, "sharing": 4},
    "a padding mask, on the CPU": {**PADDED, "device": "cpu"},
    "a padding mask without a BlockMask": {**PADDED, "blocks": False},
    "a padding mask beside no model": {**PADDED, "around": LITTLE},
    "a bias of float32 in the forward": stored(torch.float32) | {"training": False},
    "no BlockMask": {"program": STRIPED, "blocks": False},
    "a list of tiles in a model that keeps the GPU busy": {
        "tiled": True, "queries": 4096, "keys": 4096, "heads": 16, "share": 0.75, "sharing": 8, "around": LARGE,
    },
    "a list of tiles, a BlockMask that is not at hand": {
        "tiled": True, "program": BOUNDED, "queries": 8192, "keys": 8192, "heads": 32, "sharing": cost_model.LAYERS,
    },
    "a list of tiles that layers share": {"tiled": True, "queries": 16384, "keys": 16384, "share": 0.2, "sharing": 12},
    "a list of tiles, a loss of the LSE": {
        "tiled": True, "queries": 32768, "keys": 32768, "lse_gradient": True, "dtype": torch.float16, "sharing": 12,
    },
    "a list of tiles for a call that sees much": {"tiled": True, "queries": 32768, "keys": 32768, "share": 0.5},
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept(name):
    given, detail = KEPT[name]
    reason = slower(facts(**given))
    assert detail in reason.detail
    assert reason.code is (Code.LSE_GRADIENT if "lse_gradient" in given else Code.SLOWER)
    assert any(f"({row.command})" in reason.detail for row in RULES)


@pytest.mark.parametrize("name", LOWERED)
def test_what_is_lowered(name):
    assert slower(facts(**LOWERED[name])) is None


def test_a_list_of_tiles_is_expected_to_gain_what_its_rule_says():
    few, many = (cost_model.expected(facts(16384, 16384, tiled=True, share=0.2, sharing=n)) for n in (1, 10**6))
    assert few < 1 < many
    inputs = facts(16384, 16384, tiled=True, share=0.2)
    stock, ours = (sum(times(inputs).values()) for times in (cost_model.stock_times, cost_model.tile_times))
    assert many == pytest.approx(stock / ours, rel=1e-3)


@pytest.mark.parametrize("row", RULES, ids=lambda row: row.command)
def test_commands_exist(row):
    words = shlex.split(row.command)
    if words[0] == "python3":
        assert importlib.util.find_spec(words[2]) is not None
    else:
        assert words[:2] == ["cudnn-flex", "bench"]
        mods = words[words.index("--mods") + 1 : next(i for i, w in enumerate(words) if w in ("--mode", "--lower"))]
        assert mods
        assert set(mods) <= set(ALL)
