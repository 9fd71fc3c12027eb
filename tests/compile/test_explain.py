"""explain: what it finds, how it reads, and that it leaves compiled models alone."""

import inspect
import json

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import Reason, Report, collect, explain
from cudnn_flex_compile.reasons import Code
from cudnn_flex_compile.report.render import to_text
from cudnn_flex_compile.report.report import CallReport
from cudnn_flex_compile.report.words import describe_mask
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import I32, TRUE
from cudnn_flex_compile.scoremod.optable import make

EAGER = {"inner_backend": "eager"}
Q, KV = ir.index("q"), ir.index("k")
LENGTHS = ir.operand(0, I32, "b")
needs_isolation = pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters, reason="torch counts all recompiles as one"
)


def integer(value):
    return ir.const(value, I32)


def qkv(length=128, dtype=torch.bfloat16):
    return torch.randn(1, 2, length, 64, dtype=dtype)


def soft_cap(score, b, h, q, kv):
    return 20 * torch.tanh(score / 20)


def relative(score, b, h, q, kv):
    return torch.special.i0(score)


def causal(b, h, q, kv):
    return q >= kv


class Layer(torch.nn.Module):
    def __init__(self, broken=False):
        super().__init__()
        self.broken = broken

    def forward(self, x):
        x = flex_attention(x, x, x, score_mod=soft_cap)
        if self.broken:
            torch._dynamo.graph_break()
        return x * 2


@pytest.fixture(scope="module")
def report():
    mask = create_block_mask(causal, None, None, 128, 128, device="cpu")

    def model(x):
        for _ in range(3):
            x = flex_attention(x, x, x, score_mod=soft_cap, block_mask=mask)
        return flex_attention(x, x, x, score_mod=relative)

    return explain(model, qkv(), options=EAGER)


def test_finds_each_call(report):
    assert [c.strategies for c in report.lowered] == [("chained",)] * 3
    assert [c.reason.code for c in report.kept] == [Code.UNKNOWN_OP]
    assert repr(report) == "<Report of 4 flex_attention calls: 3 lowered to cuDNN, 1 kept>"


def test_shows_each_distinct_call_once(report):
    shown = str(report)
    first, kept = (next(line for line in shown.splitlines() if line.startswith(f" {n} ")) for n in (1, 2))
    assert first.split()[1] == "x3"
    for what in ("test_explain.py:", "tanh", "/ 20", "causal", "chained"):
        assert what in first
    assert "kept" in kept
    assert Code.UNKNOWN_OP.name in shown
    assert "rewrite the op" in shown


def test_fits_the_width():
    long = ir.SCORE
    for i in range(60):
        long = make("tanh", long * float(i + 2))
    reason = Reason(Code.UNKNOWN_OP, "an_op_with_a_long_name " * 20)
    calls = [CallReport('File "a/b.py", line 3, in f: x', ir.program(long)), CallReport("?", reason=reason)]
    for width in (60, 100):
        assert max(map(len, to_text(calls, Report(calls).summary, width=width).splitlines())) <= width


def test_brackets_are_no_markup():
    program = ir.program(ir.SCORE * ir.operand(0, "f32", "h"))
    assert "operand0[h]" in str(Report([CallReport("?", program, ("chained",))]))


def test_code_without_a_file_has_no_source():
    scope = {"flex_attention": flex_attention}
    exec("def layer(x): return flex_attention(x, x, x)", scope)
    shown = str(explain(scope["layer"], qkv(), options=EAGER))
    assert "unknown source" in shown
    assert "explanation" not in shown


def test_is_json(report):
    loaded = json.loads(json.dumps(report.to_dict()))
    assert (loaded["lowered"], loaded["kept"]) == (3, 1)
    assert loaded["calls"][0]["mask"] == "q >= kv"
    assert loaded["calls"][3]["reason"]["remedy"] == Code.UNKNOWN_OP.value
    assert loaded["calls"][3]["score"] is None


def test_asserts_that_all_are_lowered(report):
    Report(report.lowered).assert_all_lowered()
    with pytest.raises(AssertionError, match="UNKNOWN_OP"):
        report.assert_all_lowered()
    with pytest.raises(AssertionError, match="No flex_attention call"):
        Report().assert_all_lowered()


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (TRUE, "none"),
        (make("ge", Q, KV), "causal"),
        (make("and", make("ge", KV + integer(256), Q), make("ge", Q, KV)), "causal, window 256"),
        (make("gt", integer(256), Q - KV), "window 255"),
        (make("and", make("ge", KV + integer(64), Q), make("ge", Q + integer(64), KV)), "|q - kv| <= 64"),
        (make("ge", Q + integer(2), KV), "kv - q <= 2"),
        (make("gt", LENGTHS, KV), "kv < operand0[b]"),
        (make("ge", KV, LENGTHS), "kv >= operand0[b]"),
        (make("ge", KV, integer(3)), "kv >= 3"),
        (make("or", make("ge", Q, KV), make("gt", LENGTHS, KV)), "(q >= kv) | (operand0[b] > kv)"),
    ],
)
def test_describes_masks(mask, words):
    assert describe_mask(ir.program(mask=mask)) == words


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_leaves_compiled_models_alone(broken, in_place):
    model, x = Layer(broken), qkv()
    if in_place:
        model.compile(backend="cudnn_flex", options=EAGER)
    compiled = model if in_place else torch.compile(model, backend="cudnn_flex", options=EAGER)
    compiled(x)
    assert len(explain(compiled, x, options=EAGER).calls) == 1
    with collect() as report:
        compiled(x)
    assert report.calls == []


@pytest.mark.parametrize(
    "model", [Layer(), pytest.param(Layer(broken=True), marks=needs_isolation)], ids=["", "broken"]
)
def test_explains_more_often_than_dynamo_recompiles(model):
    with torch._dynamo.config.patch(recompile_limit=1):
        for length in (128, 160, 192):
            assert len(explain(model, qkv(length), options=EAGER).calls) == 1


def test_takes_keywords_and_methods():
    report = explain(Layer().forward, x=qkv(), options=EAGER)
    assert len(report.calls) == 1


def test_says_that_nothing_was_compiled():
    assert "No flex_attention call" in str(explain(torch.sin, torch.ones(2), options=EAGER))


def test_refuses_unknown_options():
    with pytest.raises(ValueError, match="valid options: inner_backend"):
        explain(Layer(), qkv(), options={"inner": "eager"})
