"""torch.compile(backend="cudnn_flex") on the CPU: what is lowered, what is kept and why, and equal results."""

import math
import warnings

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from cudnn_flex_compile.bench.mods import MODS, alibi, causal, softcap
from cudnn_flex_compile.reasons import Code
from cudnn_flex_compile.report.report import collect

AOT = {"inner_backend": "aot_eager"}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def draw(batch=2, heads=4, length=160, dim=16, dtype=torch.bfloat16):
    return torch.randn(batch, length, heads, dim).transpose(1, 2).to(dtype)


def qkv(**how):
    return [draw(**how) for _ in range(3)]


def run(function, *args, **options):
    with collect() as report:
        result = torch.compile(function, backend="cudnn_flex", options={**AOT, **options})(*args)
    return result, report.calls


def close(found, expected):
    """Within twice the rounding of a bfloat16 result."""
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    assert (found.double() - expected.double()).abs().max() <= 2**-6 * max(1.0, float(expected.abs().max()))


def mask_of(mask_mod, length=160, **how):
    how = {"B": None, "H": None, **how}
    return create_block_mask(mask_mod, Q_LEN=length, KV_LEN=length, device="cpu", **how) if mask_mod else None


def check(function, *args, codes, **options):
    found, calls = run(function, *args, **options)
    assert [c.reason.code if c.reason else None for c in calls] == codes, [str(c.reason) for c in calls]
    close(found, function(*args))


@pytest.mark.parametrize("name", MODS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_ten_mods_are_lowered(name, kv_heads):
    score_mod, mask_mod = MODS[name](4, 160, "cpu")
    mask = mask_of(mask_mod)
    args = [draw(), draw(heads=kv_heads), draw(heads=kv_heads)]
    check(
        lambda q, k, v: flex_attention(q, k, v, score_mod, mask, enable_gqa=kv_heads != 4),
        *args, codes=[None], lower="always",
    )  # fmt: skip


def test_inductor_is_the_default_inner_backend():
    args = qkv()

    def call(q, k, v):
        return flex_attention(q * 2, k, v, softcap(2.0)).sin()

    with collect() as report:
        found = torch.compile(call, backend="cudnn_flex")(*args)
    assert not report.kept
    close(found, call(*args))


def test_several_calls_a_graph_with_shared_functions_and_scale():
    mod, mask = softcap(3.0), mask_of(causal)

    def model(q, k, v):
        for _ in range(3):
            q = flex_attention(q, k, v, mod, mask, scale=0.5)
        return flex_attention(q, k, v)

    check(model, *qkv(), codes=[None] * 4)


def test_lse_is_natural_for_the_user():
    args = qkv()
    for request in ({"return_lse": True}, {"return_aux": AuxRequest(lse=True)}):

        def call(q, k, v, request=request):
            out, lse = flex_attention(q, k, v, softcap(2.0), mask_of_causal, **request)
            return out, getattr(lse, "lse", lse)

        mask_of_causal = mask_of(causal)
        (out, lse), calls = run(call, *args)
        expected = call(*args)
        assert calls[0].reason is None
        close(out, expected[0])
        assert torch.allclose(lse, expected[1], atol=1e-4)
        torch._dynamo.reset()


def test_an_lse_that_reaches_nothing_is_not_asked_for():
    def call(q, k, v):
        out, lse = flex_attention(q, k, v, softcap(2.0), return_lse=True)
        _ = lse.transpose(1, 2).to(q.dtype) * lse.transpose(1, 2)
        return out

    check(call, *qkv(), codes=[None])


def test_queries_of_a_larger_batch_than_keys():
    mask = mask_of(causal, B=3)
    check(
        lambda q, k, v: flex_attention(q, k, v, block_mask=mask),
        draw(batch=3),
        draw(batch=1),
        draw(batch=1),
        codes=[None],
    )


def test_captured_tensors_become_operands():
    table = torch.randn(2, 160)
    ends = torch.tensor([100, 40])

    def mask_mod(b, h, q, kv):
        return (kv < ends[b]) & (q >= kv)

    def score_mod(s, b, h, q, kv):
        return s + table[b, q] * 0.1

    mask = mask_of(mask_mod, B=2)
    check(lambda q, k, v: flex_attention(q, k, v, score_mod, mask), *qkv(), codes=[None])


def test_scores_of_minus_infinity_become_a_mask():
    def score_mod(s, b, h, q, kv):
        return torch.where(q >= kv, s, -math.inf)

    _, calls = run(lambda q, k, v: flex_attention(q, k, v, score_mod), *qkv())
    assert calls[0].strategies == ("native",)


KEPT = {
    Code.DTYPE: lambda: (lambda q, k, v: flex_attention(q, k, v), qkv(dtype=torch.float32)),
    Code.HEAD_DIM: lambda: (lambda q, k, v: flex_attention(q, k, v), qkv(dim=20)),
    Code.FORCED_BACKEND: lambda: (
        lambda q, k, v: flex_attention(q, k, v, kernel_options={"BACKEND": "TRITON"}), qkv()),
    Code.UNKNOWN_OP: lambda: (lambda q, k, v: flex_attention(q, k, v, lambda s, *_: torch.special.i0(s)), qkv()),
    Code.ILLEGAL_OP: lambda: (
        lambda q, k, v: flex_attention(q, k, v, lambda s, *_: torch.where(s > 0, s, s * 0.5)), qkv()),
    Code.BIAS_BUDGET: lambda: (_pair_gather(), qkv(batch=1, length=1000)),
    Code.BLOCK_MASK: lambda: _blocks_of_its_own(),
}  # fmt: skip


def _pair_gather(length=1000):
    bias = torch.randn(length, length)
    return lambda q, k, v: flex_attention(q, k, v, lambda s, b, h, i, j: s + bias[i, j])


def _blocks_of_its_own():
    counts, indices = torch.ones(1, 1, 2, dtype=torch.int32), torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=128, seq_lengths=(160, 160))
    return lambda q, k, v: flex_attention(q, k, v, block_mask=mask), qkv()


@pytest.mark.parametrize("code", KEPT, ids=lambda c: c.name)
def test_kept_calls_have_a_reason_and_run(code):
    function, args = KEPT[code]()
    found, calls = run(function, *args, bias_budget_mb=1)
    assert [c.reason.code for c in calls] == [code], [str(c.reason) for c in calls]
    assert calls[0].reason.remedy
    assert torch.isfinite(found).all()


def test_biases_over_pairs():
    table, distances = torch.randn(4, 400), torch.randint(0, 6, (2, 160, 160))
    half = torch.randn(160, 160, dtype=torch.bfloat16)
    ids = torch.randint(0, 3, (2, 160))
    mods = {
        "relative": (lambda s, b, h, q, kv: s + table[h, q - kv + 200], None),
        "graph distances": (lambda s, b, h, q, kv: s + table[h, distances[b, q, kv]] * 0.5, causal),
        "bfloat16": (lambda s, b, h, q, kv: s + half[q, kv], causal),
        "documents": (None, lambda b, h, q, kv: (ids[b, q] == ids[b, kv]) & (q >= kv)),
        "constant index": (lambda s, b, h, q, kv: s + distances[b, q, 3] * 0.1, None),
    }
    for score_mod, mask_mod in mods.values():
        check(lambda q, k, v, s=score_mod, m=mask_mod: flex_attention(q, k, v, s, mask_of(m, B=2)), *qkv(),
              codes=[None], lower="always")  # fmt: skip
        torch._dynamo.reset()


def test_an_exception_in_the_pass_keeps_that_call(monkeypatch):
    from cudnn_flex_compile.passes import lower_call as module

    def fail(*_):
        raise ZeroDivisionError("for the test")

    monkeypatch.setattr(module, "traced_of", fail)
    check(lambda q, k, v: flex_attention(q, k, v, softcap(2.0)), *qkv(), codes=[Code.INTERNAL])


def test_a_block_mask_is_honoured_at_every_step():
    args = qkv()
    function = torch.compile(
        lambda q, k, v, m: flex_attention(q, k, v, block_mask=m), backend="cudnn_flex", options=AOT
    )
    good = mask_of(causal)
    for mask in (good, mask_of(causal), good):
        close(function(*args, mask), flex_attention(*args, block_mask=mask))
    wrong = mask_of(lambda b, h, q, kv: q - kv > 100)
    wrong.mask_mod = good.mask_mod
    below = mask_of(lambda b, h, q, kv: (q >= kv) & (kv < 128))
    close(function(*args, wrong), flex_attention(*args, block_mask=below))
    good.kv_num_blocks.zero_()
    good.full_kv_num_blocks.zero_()
    assert not function(*args, good).any()


def test_a_block_mask_made_in_the_graph():
    args = qkv()

    def call(q, k, v, ends):
        mask = create_block_mask(lambda b, h, i, j: j < ends[b], 2, None, 160, 160, device="cpu")
        return flex_attention(q, k, v, block_mask=mask)

    found, calls = run(call, *args, torch.tensor([100, 30]))
    assert calls[0].reason is None, str(calls[0].reason)
    close(found, call(*args, torch.tensor([100, 30])))


def test_symbolic_lengths():
    function = torch.compile(
        lambda q, k, v: flex_attention(q, k, v, alibi(4, "cpu")), backend="cudnn_flex", options=AOT, dynamic=True
    )
    with collect() as report:
        for length in (160, 96, 33):
            args = qkv(length=length)
            close(function(*args), flex_attention(*args, alibi(4, "cpu")))
    assert len(report.calls) == 1
    assert report.calls[0].reason is None, str(report.calls[0].reason)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"inner": "x"}, "valid options: inner_backend"), ({"inner_backend": "nope"}, "known backends"),
     ({"certify": "maybe"}, "valid values"), ({"bias_budget_mb": -1}, "0 and more"), ({"mode": "fast"}, "valid values"),
     ({"bias_budget_mb": "many"}, "expected int"), ({"inner_backend": "cudnn_flex"}, "must be another")],
)  # fmt: skip
def test_bad_options_are_refused_and_list_the_valid_ones(options, message):
    with pytest.raises(Exception, match=message):
        torch.compile(lambda q, k, v: flex_attention(q, k, v), backend="cudnn_flex", options=options)(*qkv())


def _error_of(backend, function, args):
    torch._dynamo.reset()
    try:
        return None, torch.compile(function, backend=backend)(*args)
    except Exception as error:
        return type(error).__name__, None


BAD = {
    "float64": (lambda q, k, v: flex_attention(q, k, v), lambda: qkv(dtype=torch.float64)),
    "no keys": (lambda q, k, v: flex_attention(q, k, v), lambda: [draw(), draw(length=0), draw(length=0)]),
    "no queries": (lambda q, k, v: flex_attention(q, k, v), lambda: [draw(length=0), draw(), draw()]),
    "heads": (lambda q, k, v: flex_attention(q, k, v), lambda: [draw(heads=4), draw(heads=3), draw(heads=3)]),
    "dims": (lambda q, k, v: flex_attention(q, k, v), lambda: [draw(dim=16), draw(dim=32), draw(dim=16)]),
    "integer scores": (lambda q, k, v: flex_attention(q, k, v, lambda s, *_: s.to(torch.int32)), qkv),
    "double scores": (lambda q, k, v: flex_attention(q, k, v, lambda s, *_: s.double()), qkv),
    "python branches": (lambda q, k, v: flex_attention(q, k, v, lambda s, b, *_: s if b > 0 else s * 2), qkv),
    "nested": (lambda q, k, v: flex_attention(q, k, v), lambda: [
        torch.nested.nested_tensor([torch.randn(n, 4, 16) for n in (5, 7)], layout=torch.jagged).transpose(1, 2)] * 3),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_stocks_error_or_stocks_numbers(name):
    function, make = BAD[name]
    args = make()
    stock, expected = _error_of("aot_eager", function, args)
    torch._dynamo.reset()
    if stock is not None:
        with pytest.raises(Exception) as raised:  # noqa: PT011
            run(function, *args)
        assert raised.type.__name__ == stock
    else:
        torch.testing.assert_close(run(function, *args)[0], expected)


def test_a_node_that_cannot_be_read_keeps_the_calls_of_its_graph(monkeypatch, caplog):
    """Another torch may give flex_attention's node other arguments: the model runs as without us."""

    def unreadable(graph_module):
        raise ValueError("not enough values to unpack (expected at least 7, got 6)")

    monkeypatch.setattr("cudnn_flex_compile.passes.lower_graph.find_calls", unreadable)
    check(lambda q, k, v: flex_attention(q, k, v, softcap(2.0)), *qkv(), codes=[Code.TORCH])
    assert "cannot be read" in caplog.text
    assert "not enough values" in caplog.text
