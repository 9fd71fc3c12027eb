"""The table of speed rules: each row keeps the calls that it is about, and names a command that exists."""

import importlib.util
import shlex
from types import SimpleNamespace

import pytest
import torch

from cudnn_flex_compile.bench.mods import ALL
from cudnn_flex_compile.passes import estimates, speed
from cudnn_flex_compile.passes.estimates import Facts
from cudnn_flex_compile.passes.speed import ROWS, SIZES, slower
from cudnn_flex_compile.reasons import Code
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32
from cudnn_flex_compile.scoremod.optable import make

CAUSAL = ir.program(mask=make("ge", ir.index("q"), ir.index("k")))
CAPPED = ir.program(make("tanh", ir.SCORE / 20.0) * 20.0, CAUSAL.mask)
PAIRS = ir.program(ir.SCORE + ir.operand(0, F32, "hqk"))
DISTANCE = ir.index("q") - ir.index("k")
BY_HEAD = ir.program(mask=make("ge", ir.index("q"), ir.index("k") + ir.index("h")))
SHORT_ROWS = ir.program(mask=make("gt", ir.operand(0, ir.I32, "b"), ir.index("k")))
PADDED = {
    "program": SHORT_ROWS, "queries": 4096, "keys": 4096, "heads": 16, "share": 1.0, "host_counts": True,
}  # fmt: skip
STRIPED = ir.program(mask=make("eq", make("mod", DISTANCE, ir.const(3, ir.I32)), ir.const(0, ir.I32)))


def facts(queries=2048, keys=2048, training=True, device="cuda", program=CAUSAL, share=None, blocks=True, **more):
    dtype = more.pop("dtype", torch.bfloat16)

    heads = more.pop("heads", 4)

    def tensor(length):
        return SimpleNamespace(shape=(2, heads, length, 64), device=torch.device(device), dtype=dtype)

    given = {"query": tensor(queries), "key": tensor(keys), "value": tensor(keys)}
    call = SimpleNamespace(**given, blocks=("there",) if blocks else ())
    more = {"hoisted": (), "lse_gradient": False, "host_counts": False, **more}
    return Facts(call, program, training=training, share=share, **more)  # pyright: ignore


def stored(dtype):
    return {"program": PAIRS, "hoisted": (SimpleNamespace(stored=dtype, learned=False),), "blocks": False}


KEPT = {
    "decoding": ({"queries": 1, "training": False}, "decoding"),
    "decoding, the last length": ({"queries": 16, "keys": 32768, "training": False}, "decoding"),
    "a call among others that spares the GPU little": ({"host_counts": True, "share": 0.53}, "which the host may take"),
    "such a call in the forward": (
        {"host_counts": True, "queries": 4096, "keys": 4096, "share": 0.53, "training": False},
        "which the host may take",
    ),
    "a loss of the LSE in a call that spares the GPU little": (
        {"lse_gradient": True, "host_counts": True, "queries": 4096, "keys": 4096, "heads": 16, "share": 0.53},
        "which the host may take",
    ),
    "a padding mask, few layers": ({**PADDED, "sharing": 3}, "takes some time at each step, and 3 calls would spare"),
    "a padding mask that hides much": ({**PADDED, "share": 0.75, "sharing": 100}, "spare the GPU 0.00 ms"),
    "a loss of the LSE": ({"lse_gradient": True, "dtype": torch.float16}, "the LSE takes part"),
    "a loss of the LSE, few keys": ({"lse_gradient": True, "queries": 512, "keys": 512}, "256 keys to compute"),
    "a loss of the LSE, few blocks": ({"lse_gradient": True, "share": 0.43}, "1024 keys to compute"),
    "a loss of the LSE, fewer keys, a soft cap": (
        {"lse_gradient": True, "program": CAPPED, "queries": 129, "keys": 257}, "65 keys to compute",
    ),
    "a bias is read": (stored(torch.float32), "read from memory"),
    "a bias of bfloat16 in the forward": (stored(torch.bfloat16) | {"training": False}, "read from memory"),
    "blocks that are not known": ({"program": STRIPED}, "without tile skipping"),
    "fewer blocks": ({"share": 0.2}, "of the pairs, the BlockMask lists 20%"),
    "a list of tiles for one short call": ({"tiled": True, "share": 0.2}, "and 1 call would save"),
    "a list of tiles, blocks that are not known": ({"tiled": True}, "and 1 call would save"),
    "a list of tiles for layers that see little": (
        {"tiled": True, "queries": 8192, "keys": 8192, "share": 0.01, "sharing": 12}, "and 12 calls would save",
    ),
    "a list of tiles for each head": (
        {"tiled": True, "queries": 8192, "keys": 8192, "share": 0.2, "sharing": 12, "program": BY_HEAD}, "save",
    ),
    "a list of tiles in decoding": ({"tiled": True, "queries": 1, "training": False}, "decoding"),
}
LOWERED = {
    "known tile skipping": {},
    "a loss of the LSE": {"lse_gradient": True},
    "a loss of the LSE, known blocks": {"lse_gradient": True, "share": 0.53},
    "a loss of the LSE, few keys, a soft cap": {
        "lse_gradient": True, "program": CAPPED, "queries": 512, "keys": 512, "share": 0.6,
    },
    "as many blocks": {"share": 0.53},
    "decoding with gradients": {"queries": 16},
    "more queries": {"queries": 17, "training": False},
    "a short sequence by itself": {"queries": 128, "keys": 128},
    "a call among others that spares the GPU much": {
        "host_counts": True, "queries": 4096, "keys": 4096, "heads": 16, "share": 0.53,
    },
    "such a call in the forward": {
        "host_counts": True, "queries": 8192, "keys": 8192, "heads": 16, "share": 0.53, "training": False,
    },
    "a soft cap, among others": {"host_counts": True, "program": CAPPED, "heads": 32, "share": 0.53},
    "a loss of the LSE, a soft cap, among others": {
        "lse_gradient": True, "program": CAPPED, "host_counts": True, "queries": 4096, "keys": 4096, "heads": 16,
        "share": 0.53,
    },
    "a call among others, on the CPU": {"host_counts": True, "device": "cpu"},
    "a padding mask, four layers": {**PADDED, "sharing": 4},
    "a padding mask, on the CPU": {**PADDED, "device": "cpu"},
    "a padding mask without a BlockMask": {**PADDED, "blocks": False},
    "on the CPU": {"queries": 1, "training": False, "device": "cpu"},
    "a bias of float32 in the forward": stored(torch.float32) | {"training": False},
    "no BlockMask": {"program": STRIPED, "blocks": False},
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
    assert any(f"({row.command})" in reason.detail for row in ROWS)


@pytest.mark.parametrize("name", LOWERED)
def test_what_is_lowered(name):
    assert slower(facts(**LOWERED[name])) is None


def test_a_list_of_tiles_is_expected_to_gain_what_its_rule_says():
    few, many = (estimates.expected(facts(16384, 16384, tiled=True, share=0.2, sharing=n)) for n in (1, 10**6))
    assert few < 1 < many
    stock, ours = (line.at(2 * (64 + 64) * 2 * 4 * 16384 * 16384 * 0.2 / 1e12) for line in estimates.CALLS[True])
    assert many == pytest.approx(stock / ours, rel=1e-3)


def test_a_size_is_changed_in_one_place(monkeypatch):
    monkeypatch.setattr(speed, "SIZES", ())
    assert slower(facts(queries=1, training=False)) is None


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.command)
def test_commands_exist(row):
    words = shlex.split(row.command)
    if words[0] == "python3":
        assert importlib.util.find_spec(words[2]) is not None
    else:
        assert words[:2] == ["cudnn-flex", "bench"]
        mods = words[words.index("--mods") + 1 : next(i for i, w in enumerate(words) if w in ("--mode", "--lower"))]
        assert mods
        assert set(mods) <= set(ALL)


def test_boxes_say_what_the_call_is():
    assert len({box.why for box in SIZES}) == len(SIZES)
