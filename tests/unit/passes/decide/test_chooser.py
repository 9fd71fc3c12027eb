"""Which way to run a call wins, by prediction: calls that are kept, lowered, and those that run by lists of tiles."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.passes.decide import chooser, cost_inputs, cost_model
from cudnn_flex_compile.passes.decide.chooser import STOCK, choose, name_of
from cudnn_flex_compile.passes.decide.cost_inputs import Blocks, CostInputs, Workload
from cudnn_flex_compile.passes.decide.eligibility import unplannable
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
        {"queries": 1, "keys": growing(4096), "training": False}, "a plan for each number",
    ),
    "decoding, by tiles": (
        {"queries": 16, "keys": growing(4096), "training": False, "tiled": True}, "a plan for each number",
    ),
    "a call of a model that keeps the host busy": (
        {"around": BUSY, "queries": 4096, "keys": 4096, "heads": 16, "share": 0.53}, " host)",
    ),
    "such a call in the forward": (
        {"around": BUSY, "queries": 4096, "keys": 4096, "heads": 16, "share": 0.53, "training": False},
        " host)",
    ),
    "the forward of a model whose steps keep the GPU busy": (
        {"around": LLAMA, "queries": 4096, "keys": 4096, "heads": 32, "share": 0.53, "training": False},
        " host)",
    ),
    "a short call beside little else": ({"around": LITTLE, "queries": 256, "keys": 256}, " host)"),
    "a loss of the LSE that spares the GPU little": (
        {"lse_gradient": True, "around": LITTLE, "queries": 4096, "keys": 4096, "heads": 16, "share": 0.53},
        " host)",
    ),
    "a padding mask, few layers": ({**PADDED, "sharing": 2}, " mask)"),
    "a padding mask that hides much": ({**PADDED, "share": 0.65, "sharing": 100}, " mask)"),
    "a loss of the LSE, few keys": ({"lse_gradient": True, "queries": 512, "keys": 512}, " LSE)"),
    "a loss of the LSE, few blocks": ({"lse_gradient": True, "share": 0.43}, " LSE)"),
    "a loss of the LSE, fewer keys, a soft cap": (
        {"lse_gradient": True, "program": CAPPED, "queries": 129, "keys": 257}, " LSE)",
    ),
    "a bias is read": (stored(torch.float32), "graphs"),
    "a bias of bfloat16 in the forward": (stored(torch.bfloat16) | {"training": False}, "graphs"),
    "blocks that are not known": ({"program": STRIPED}, "graphs"),
    "fewer blocks": ({"share": 0.2}, "graphs"),
    "documents by bounds, a BlockMask that is not at hand": (
        {"program": BOUNDED, "queries": 8192, "keys": 8192, "heads": 32}, "graphs",
    ),
    "a list of tiles for one short call": ({"tiled": True, "share": 0.2}, " list)"),
    "a list of tiles, blocks that are not known": ({"tiled": True}, " list)"),
    "a list of tiles for layers that see little": (
        {"tiled": True, "queries": 8192, "keys": 8192, "share": 0.01, "sharing": 12}, " list)",
    ),
    "a list of tiles in a model that keeps the host busy": (
        {"tiled": True, "queries": 4096, "keys": 4096, "heads": 16, "share": 0.75, "around": BUSY},
        " list + 0.200 host)",
    ),
    "a list of tiles in a model of one layer": (
        {"tiled": True, "queries": 4096, "keys": 4096, "heads": 16, "share": 0.75, "around": LARGE}, " list)",
    ),
    "a list of tiles for each head": (
        {"tiled": True, "queries": 8192, "keys": 8192, "share": 0.1, "sharing": 12, "program": BY_HEAD}, " list)",
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
        "tiled": True, "program": BOUNDED, "queries": 8192, "keys": 8192, "heads": 32, "sharing": cost_inputs.LAYERS,
    },
    "a list of tiles that layers share": {"tiled": True, "queries": 16384, "keys": 16384, "share": 0.2, "sharing": 12},
    "a list of tiles, a loss of the LSE": {
        "tiled": True, "queries": 32768, "keys": 32768, "lse_gradient": True, "dtype": torch.float16, "sharing": 12,
    },
    "a list of tiles for a call that sees much": {"tiled": True, "queries": 32768, "keys": 32768, "share": 0.5},
}


def chosen(inputs):
    """The choice between Inductor's kernel and one way of ours."""
    ways = {(): inputs} if not inputs.tiled else {(): replace(inputs, tiled=()), inputs.tiled: inputs}
    return choose(ways, only_faster=True, measure=None, every=False)


def is_kept(inputs):
    return unplannable(inputs.call, inputs.training) is not None or inputs.tiled not in chosen(inputs).order


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept(name):
    given, detail = KEPT[name]
    inputs = facts(**given)
    assert is_kept(inputs)
    reason = unplannable(inputs.call, inputs.training) or chosen(inputs).slower
    assert detail in reason.detail
    assert reason.code is (Code.LSE_GRADIENT if "lse_gradient" in given else Code.SLOWER)
    assert "python" not in reason.detail


@pytest.mark.parametrize("name", LOWERED)
def test_what_is_lowered(name):
    assert not is_kept(facts(**LOWERED[name]))


@pytest.mark.parametrize("name", KEPT)
def test_what_is_slower_is_lowered_where_that_is_asked_for_and_the_report_compares(name):
    ways = {(): facts(**{**KEPT[name][0], "tiled": False})}
    choice = choose(ways, only_faster=False, measure=None, every=False)
    assert choice.order == ((),)
    assert {contender.name for contender in choice.contenders(())} == {"graphs", "inductor"}


def test_the_reason_has_all_contenders_in_order():
    given = facts(around=BUSY, queries=4096, keys=4096, heads=16, share=0.53)
    assert chosen(given).slower.detail == (
        "milliseconds of a step: inductor 0.641, graphs 0.668 (0.468 kernels + 0.200 host); predicted"
    )
    shared = chosen(facts(tiled=True, queries=8192, keys=8192, share=0.01, sharing=12)).slower.detail
    assert shared.startswith("milliseconds of a step in each of 12 calls: inductor")
    assert "tile lists (forward, backward)" in shared


@pytest.mark.parametrize(("dim", "kv_heads", "all_are"), [(256, 2, True), (256, 4, False), (128, 2, False)])
def test_backwards_by_lists_of_large_heads_that_share_keys_are_measured(dim, kv_heads, all_are):
    """No table tells their times: here the lists are not as fast as they are predicted to be."""
    listed = given(8192, dim, heads=4, tiled=True, program=CAUSAL)
    listed.call.key.shape = (2, kv_heads, 8192, dim)
    ways = {(): replace(listed, tiled=()), (FORWARD,): replace(listed, tiled=(FORWARD,)), BOTH: listed}
    asked = []
    times = {chooser.STOCK: (9.0, 9.0), (): (1.0, 3.0), (FORWARD,): (0.8, 3.0), BOTH: (0.8, 4.0)}

    def measure(names):
        asked.extend(names)
        return {name: times[name] for name in names}

    choice = choose(ways, only_faster=True, measure=measure, every=False)
    assert (set(asked) == set(times)) == all_are
    assert choice.order[0] == ((FORWARD,) if all_are else BOTH)


def test_ties_are_ours(monkeypatch):
    monkeypatch.setattr(chooser, "ours", lambda inputs, measured: cost_model.inductors(inputs))
    assert chosen(facts()).order == ((),)


FULL = ir.program()
SHARED = {"sharing": 12}
WINDOW = ir.program(mask=make("and", CAUSAL.mask, make("ge", ir.index("k") + ir.const(255, ir.I32), ir.index("q"))))
BOTH = FORWARD, BACKWARD


def given(length, dim, heads=32, program=CAUSAL, **more):
    found = facts(length, length, heads=heads, program=program, **{**SHARED, **more})
    for tensor in (found.call.query, found.call.key, found.call.value):
        tensor.shape = (*tensor.shape[:3], dim)
    return found


BY_LISTS = {
    "head dim 64": (given(4096, 64), BOTH),
    "head dim 128": (given(8192, 128), BOTH),
    "no mask at all": (given(8192, 128, program=FULL, blocks=False), BOTH),
    "head dim 256: the backward is slower": (given(8192, 256), (FORWARD,)),
    "head dim 256 without gradients": (given(8192, 256, training=False), (FORWARD,)),
    "head dim 72: of the next kind": (given(8192, 72), BOTH),
    "short sequences: the forward is slower": (given(512, 64, heads=768), (BACKWARD,)),
    "short sequences of another head dim": (given(512, 128, heads=768), ()),
    "shorter ones": (given(256, 64, heads=768), ()),
    "a window": (given(16384, 128, program=WINDOW, sharing=32), BOTH),
    "launches that would wait for the host": (given(1024, 64, heads=2), ()),
    "one call, which would save less than its list takes": (given(1024, 128, sharing=1, program=SHORT_ROWS), ()),
}


def fastest(inputs, apart=True):
    """The directions that run by a list, if each may run in its own way, or not."""
    ways = [(), inputs.directions] + ([(FORWARD,), (BACKWARD,)] if apart and inputs.training else [])
    return choose({way: replace(inputs, tiled=way) for way in ways}, False, None, False).order[0]


@pytest.mark.parametrize("name", BY_LISTS)
def test_directions_that_run_by_a_list(name):
    inputs, expected = BY_LISTS[name]
    assert fastest(inputs) == expected


def test_where_both_run_in_one_way_their_sum_decides():
    assert fastest(given(8192, 128), apart=False) == BOTH
    assert fastest(given(8192, 256), apart=False) == (), "the backward loses what the forward gains"
    assert fastest(given(8192, 256, training=False), apart=False) == (FORWARD,)


def test_a_block_mask_that_hides_more_than_a_graph_skips():
    assert fastest(given(8192, 256, program=STRIPED, share=0.9)) == (FORWARD,)
    assert fastest(given(8192, 256, program=STRIPED, share=0.5)) == BOTH


def test_dtypes_are_alike():
    assert fastest(given(8192, 128, dtype=torch.float16)) == BOTH


def test_names():
    names = [name_of(way) for way in ((), (BACKWARD,), BOTH, ("inductor",))]
    assert names == ["graphs", "tile lists (backward)", "tile lists (forward, backward)", "inductor"]


@pytest.mark.parametrize(("tiled", "folded"), [((), True), ((FORWARD,), True), ((BACKWARD,), False), (BOTH, False)])
def test_the_gradient_of_the_log_sum_exp_costs_graphs_a_pass(tiled, folded):
    """The backward by a list takes it as it is."""
    inputs = replace(facts(lse_gradient=True, around=LITTLE), tiled=tiled)
    assert ("LSE" in {name for name, _ in cost_model.ours(inputs).rest}) == folded
    assert ("LSE" in {name for name, _ in cost_model.ours(inputs, (1.0, 1.0)).rest}) is False


@pytest.fixture
def exact():
    """Algorithms must be deterministic."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_backwards_are_contenders_of_their_own(exact):
    """No table has their times: all are measured, and the fastest of them wins, however plain a prediction is."""
    inputs = given(8192, 128, heads=128)
    ways = {(): inputs, BOTH: replace(inputs, tiled=BOTH), (FORWARD,): replace(inputs, tiled=(FORWARD,))}
    times = {(): (1.0, 5.0), BOTH: (1.0, 9.5), (FORWARD,): (0.9, 5.0), STOCK: (2.0, 8.0)}
    asked = []

    def measure(doubtful):
        asked.append(set(doubtful))
        return {way: times[way] for way in doubtful}

    assert choose(ways, True, measure, False).order == ((FORWARD,), ())
    assert asked == [set(times)]
    torch.use_deterministic_algorithms(False)
    assert choose(ways, True, measure, False).order[0] == BOTH
    assert len(asked) == 1, "what the table tells"


def test_a_deterministic_forward_is_the_usual_one(exact):
    inputs = given(8192, 128, heads=128, training=False)
    assert choose({(): inputs}, True, lambda ways: pytest.fail("measured"), False).order == ((),)


def test_predictions_say_that_they_know_no_deterministic_backward(exact):
    assert chosen(facts(share=0.2)).slower.detail.endswith("; predicted, as if no backward had to be deterministic")
