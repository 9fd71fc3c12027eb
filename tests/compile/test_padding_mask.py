"""Padding masks of any content, and lengths that are symbolic: right at every step, as closures and as inputs.

Knows nothing of BlockMasks that disagree with their mask_mods (test_block_mask.py).
"""

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from cudnn_flex_compile.bench.mods import causal, causal_padding, padded, softcap
from cudnn_flex_compile.passes import lower_call
from cudnn_flex_compile.scoremod.ir import TRUE
from tests.compile.test_backend import close, draw, fresh  # noqa: F401
from tests.support.block_masks import code_of, compilations, lowered_steps

BATCH, LENGTH = 3, 160
PADDINGS = {
    "right": lambda n: torch.arange(n) < torch.tensor([[n], [n // 3], [1]]),
    "left": lambda n: torch.arange(n) >= torch.tensor([[0], [n // 3], [n - 1]]),
    "scattered": lambda n: torch.rand(BATCH, n, generator=torch.Generator().manual_seed(n)) > 0.4,
    "all of one batch entry": lambda n: torch.tensor([[True], [False], [True]]).expand(BATCH, n).clone(),
    "none": lambda n: torch.ones(BATCH, n, dtype=torch.bool),
}


def queries(length=LENGTH, keys=None, kv_heads=4):
    keys = keys or length
    return [draw(BATCH, 4, length), draw(BATCH, kv_heads, keys), draw(BATCH, kv_heads, keys)]


def mask_of(padding, queries=None):
    keys = padding.shape[1]
    return create_block_mask(causal_padding(padding), BATCH, None, queries or keys, keys, "cpu")


def attend(q, k, v, mask, score_mod=None, return_lse=False):
    request = AuxRequest(lse=True) if return_lse else None
    out = flex_attention(q, k, v, score_mod, mask, enable_gqa=q.shape[1] != k.shape[1], return_aux=request)
    return torch.cat([out[0], out[1].lse.clamp(-100).unsqueeze(-1).to(q.dtype)], -1) if return_lse else out


@pytest.fixture
def permuted(monkeypatch):
    """Whether each lowered call permutes its keys."""
    seen, compacted = [], lower_call.compacted

    def watched(*args):
        found = compacted(*args)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(lower_call, "compacted", watched)
    return seen


@pytest.mark.parametrize("kind", PADDINGS)
def test_a_closure(kind, permuted):
    mask = mask_of(PADDINGS[kind](LENGTH))
    calls = lowered_steps(lambda q, k, v: attend(q, k, v, mask), [queries()])
    assert code_of(calls) is None
    assert permuted == [True]


FORMS = {
    "plain": {}, "fewer key heads": {"kv_heads": 2}, "one key head": {"kv_heads": 1}, "more keys": {"keys": 300},
    "fewer keys": {"keys": 70}, "soft cap": {"score_mod": softcap(2.0)}, "log-sum-exp": {"return_lse": True},
    "all of them": {"kv_heads": 2, "keys": 300, "score_mod": softcap(2.0), "return_lse": True},
    "a score by query": {"score_mod": lambda s, b, h, q, kv: s * 0.5 + q * 0.01},
}  # fmt: skip


SYMBOLIC_FORMS = ("plain", "all of them")  # static ones take less time to compile


@pytest.mark.parametrize(
    ("form", "dynamic"), [*((form, None) for form in FORMS), *((form, True) for form in SYMBOLIC_FORMS)]
)
def test_inputs_that_change_each_step(form, dynamic, permuted):
    how = dict(FORMS[form])
    shape = {n: how.pop(n) for n in ("kv_heads", "keys") if n in how}
    args, keys = queries(**shape), shape.get("keys", LENGTH)
    steps = [(*args, mask_of(make(keys), LENGTH)) for make in list(PADDINGS.values())[1:4]]

    def function(*given):
        return attend(*given, **how)

    expected = compilations(function, steps, dynamic=dynamic)
    calls = lowered_steps(function, steps, dynamic=dynamic)
    assert code_of(calls) is None
    assert len(calls) == expected
    assert permuted == [True] * expected


def test_padding_that_changes_in_place(permuted):
    padding = PADDINGS["none"](LENGTH).clone()
    args = queries()

    def steps():
        for make in PADDINGS.values():
            padding.copy_(make(LENGTH))
            yield *args, mask_of(padding)

    assert code_of(lowered_steps(attend, steps())) is None
    assert permuted == [True]


def test_made_in_the_graph():
    def model(q, k, v, padding):
        mask = mask_of(padding)
        return attend(attend(q, k, v, mask), k, v, mask)

    args = queries()
    calls = lowered_steps(model, [(*args, make(LENGTH)) for make in PADDINGS.values()])
    assert code_of(calls) is None
    assert len(calls) == 2


ENDS = torch.tensor([150, 1, 64])
SYMBOLIC = {
    "causal": lambda n: create_block_mask(causal, None, None, n, n, "cpu"),
    "captured lengths": lambda n: create_block_mask(padded(ENDS), BATCH, None, n, n, "cpu"),
    "padding": lambda n: mask_of(PADDINGS["scattered"](n)),
}


@pytest.mark.parametrize(
    ("name", "home"),
    [*((n, "an input") for n in SYMBOLIC), ("causal", "in the graph"), ("captured lengths", "in the graph")],
)
def test_symbolic_lengths(name, home):
    make = SYMBOLIC[name]
    steps = [(*queries(n), make(n) if home == "an input" else ()) for n in (160, 200, 96, 33)]

    def model(q, k, v, mask):
        return attend(q, k, v, mask if home == "an input" else make(q.shape[2]))

    assert code_of(lowered_steps(model, steps, dynamic=True)) is None


def test_symbolic_lengths_of_a_padding_input():
    def model(q, k, v, padding):
        return attend(q, k, v, mask_of(padding))

    steps = [(*queries(n), PADDINGS[kind](n)) for n, kind in ((160, "right"), (200, "left"), (96, "scattered"))]
    calls = lowered_steps(model, steps, dynamic=True)
    assert code_of(calls) is None
    close(attend(*steps[0][:3], mask_of(steps[0][3])), model(*steps[0]))


def test_nothing_masked_in_the_graph():
    """As HuggingFace's encoders mask nothing: blocks of create_block_mask, no mask_mod that stands for any blocks."""

    def model(q, k, v):
        return attend(q, k, v, create_block_mask(lambda b, h, row, column: row >= 0, None, None, LENGTH, LENGTH, "cpu"))

    (call,) = calls = lowered_steps(model, [queries()])
    assert code_of(calls) is None
    assert call.program.mask is TRUE
