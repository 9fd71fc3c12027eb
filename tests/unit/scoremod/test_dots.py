"""Dots of captured vectors: found in every spelling, with their rows and factors; anything else is named."""

import math

import pytest
import torch

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.aten import fake_mode, value_graph, without_sums
from cudnn_flex_compile.scoremod.aten_table import Untraceable
from cudnn_flex_compile.scoremod.dots import NotAdded, split_dots
from cudnn_flex_compile.scoremod.interpret import environment, evaluate
from cudnn_flex_compile.scoremod.ir import BOOL, F32, I32, SCORE
from cudnn_flex_compile.scoremod.ranges import narrow
from cudnn_flex_compile.scoremod.simplify import simplify
from cudnn_flex_compile.scoremod.text import infix
from cudnn_flex_compile.scoremod.trace import Captured, trace
from tests.support.vectors import SPELLINGS

CPU = torch.device("cpu")
LANES, LENGTH = 6, 5
A, C = torch.randn(2, 4, LENGTH, LANES), torch.randn(2, 4, LENGTH, LANES)
TABLE, IDS, ONE = torch.randn(4, LENGTH), torch.arange(8).view(2, 4), torch.tensor(2.0)
CAPTURED = {"a": A, "c": C, "table": TABLE, "ids": IDS, "one": ONE, "weights": torch.randn(LANES)}
LEAVES = {name: ir.capture(i, I32 if name == "ids" else F32) for i, name in enumerate(CAPTURED)}


def traced(function, takes_score=True, **changed):
    captured = [Captured({**CAPTURED, **changed}[name], leaf) for name, leaf in LEAVES.items()]
    return trace(function, takes_score, captured, CPU)


def written(source, **changed):
    """The traced score_mod of a text over s, b, h, q, kv and the captured tensors."""
    names = ("s", "b", "h", "q", "kv", *CAPTURED)
    return traced(eval(f"lambda {', '.join(names)}: {source}", {"torch": torch, "dot": torch.dot}), **changed)


def split(source, **changed):
    score, dots = split_dots(written(source, **changed))
    return infix(simplify(narrow(score))), dots


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_found(name):
    def score_mod(s, b, h, q, kv, a, c, *_):
        return s + SPELLINGS[name](a[b, h, q], c[b, h // 2, kv]) * 0.5

    score, dots = split_dots(traced(score_mod))
    assert score is SCORE or simplify(score) is SCORE
    found = {(d.query.source, d.key.source): d for d in dots}
    dot = found[LEAVES["a"], LEAVES["c"]]
    assert len(dots) == 1
    assert [infix(p) for p in dot.query.places[:3]] == ["b", "h", "q"]
    assert [infix(p) for p in dot.key.places[:3]] == ["b", "h // 2", "kv"]
    assert dot.query.places[3] is dot.key.places[3] is ir.lane(LANES)
    assert math.isclose(dot.factor.value, 0.5)


DOT = "dot(a[b, h, q], c[b, h, kv])"
FOUND = {
    f"s + {DOT}": ("score", 1.0),
    f"s - {DOT} * 2": ("score", -2.0),
    f"({DOT} / 4 + s) * 0.5": ("score * 0.5", 0.25),
    f"s * 0.5 + {DOT} * 0.5": ("score * 0.5", 1.0),
    f"-(s * 2) - {DOT}": ("score * -2", 0.5),
    f"torch.tanh((s + {DOT} + table[h, q]) / 20) * 20": None,
    f"torch.where(q >= kv, s + {DOT}, -1e4)": None,
    f"(s + {DOT}) * torch.sigmoid(s + {DOT})": ("score * sigmoid(score)", 1.0),
    f"s + {DOT} + {DOT} * 2": ("score", 3.0),
    f"s + one * {DOT}": None,
    f"s + table[h, q] * {DOT} + table[h, kv]": None,
}


@pytest.mark.parametrize("source", FOUND)
def test_the_sum_is_the_score(source):
    score, dots = split(source)
    assert len(dots) == 1
    if FOUND[source] is not None:
        assert (score, dots[0].factor.value) == FOUND[source]


def test_several_dots():
    score, dots = split("s + dot(a[b, h, q], c[b, h, kv]) - dot(a[0, h, q], c[b, 1, kv]) * 3")
    assert score == "score"
    assert sorted(d.factor.value for d in dots) == [-3, 1]
    _, dots = split("s + (a[b, h, q] * c[b, h, kv] + a[0, h, q] * c[b, h, kv]).sum()")
    assert len(dots) == 2


NOT_ADDED = {
    f"torch.tanh(s) + {DOT}": "inside of all",
    f"torch.tanh({DOT}) + s": "inside of all",
    f"s * {DOT}": "inside of all",
    f"torch.where(q >= kv, s + {DOT}, s)": "inside of all",
    f"(s + {DOT}) * s": "inside of all",
    f"s + {DOT} * {DOT}": "inside of all",
    f"(s + {DOT}) * (s + 2 * {DOT})": "inside of all",
    f"{DOT}": "inside of all",
    f"s + table[h, kv] * {DOT}": "varies along kv",
    "s + dot(a[b, h, q - 1], c[b, h, kv])": "read at q",
    "s + dot(a[b, h, q], c[b, h, kv // 2])": "read at kv",
    "s + dot(a[b, h, q], c[b, h, q])": "read at q",
    "s + dot(a[b, ids[b, h], q], c[b, h, kv])": "read at",
    "s + dot(a[b, q, q], c[b, h, kv])": "read at q",
    "s + (a[b, h, q] * torch.exp(c[b, h, kv])).sum()": "computed, not read",
}
UNTRACEABLE = {
    "s + a[b, h, q].sum()": "no product of two",
    "s + (a[b, h, q] * c[b, h, kv] * weights).sum()": "no product of two",
    "s + (a[b, h, q] + c[b, h, kv]).sum()": "no product of two",
    "s + (a[b, h, q] * c[b, h, kv]).amax()": "amax",
    "s + (a[b, h] @ c[b, h, kv])[q]": "dimensions",
    "s + a[b, h, q]": "dimensions",
    "s + dot(a[b, h, q].to(torch.bfloat16), c[b, h, kv].to(torch.bfloat16))": "cast",
    "s + a[ids[b], h, q].sum()": "vector",
}  # fmt: skip


@pytest.mark.parametrize("source", NOT_ADDED)
def test_what_no_longer_head_computes_is_named(source):
    with pytest.raises(NotAdded, match=NOT_ADDED[source]):
        split(source)


@pytest.mark.parametrize("source", UNTRACEABLE)
def test_what_is_no_dot_is_named(source):
    with pytest.raises(Untraceable, match=UNTRACEABLE[source]):
        written(source)


def test_a_gradient_that_stops_is_kept_in_mind():
    learned = {"a": A.clone().requires_grad_(), "c": C.clone().requires_grad_()}
    captured = [Captured({**CAPTURED, **learned}[name], leaf, name in learned) for name, leaf in LEAVES.items()]
    score = trace(lambda s, b, h, q, kv, a, c, *_: s + torch.dot(a[b, h, q].detach(), c[b, h, kv]), True, captured, CPU)
    _, (dot,) = split_dots(score)
    assert (dot.query.stopped, dot.key.stopped) == (True, False)
    assert dot.learned == {LEAVES["c"]}


MASKS = {
    "any": lambda b, h, q, kv, a, c, table, ids, *_: (ids[b] == kv).any(),
    "any, of a dim": lambda b, h, q, kv, a, c, table, ids, *_: (ids[b] == kv.unsqueeze(-1)).any(dim=-1),
    "all": lambda b, h, q, kv, a, c, table, ids, *_: (ids[b] <= q + kv).all(0),
    "sum": lambda b, h, q, kv, a, c, table, ids, *_: (ids[b] <= kv).sum() >= 2,
    "entries": lambda b, h, q, kv, a, c, table, ids, *_: (ids[b] + 1)[2] <= q + kv,
    "entry": lambda b, h, q, kv, a, c, table, ids, *_: (ids[b] * 2)[h] <= q + kv,
    "rows": lambda b, h, q, kv, a, c, table, *_: (a[b, h, q] > c[b, h, kv]).any(),
}


@pytest.mark.parametrize("name", MASKS)
def test_vectors_of_a_mask_are_written_out(name):
    mask = narrow(traced(MASKS[name], takes_score=False))
    assert mask.dtype == BOOL
    assert not any(node.kind in ("lane", "dot") for node in ir.walk(mask))
    grid = torch.cartesian_prod(*(torch.arange(n) for n in (2, 4, LENGTH, LENGTH))).int().unbind(1)
    indices, captured = dict(zip(ir.AXES, grid, strict=True)), tuple(CAPTURED.values())
    leaf = environment(torch.zeros(()), indices, {}, {}, {}, captured=captured)
    wanted = [bool(MASKS[name](*(i.long() for i in place), *CAPTURED.values())) for place in zip(*grid, strict=True)]
    assert evaluate(mask, leaf).tolist() == wanted


def test_long_vectors_are_not_written_out():
    ids = torch.arange(130).view(2, 65)
    with pytest.raises(Untraceable, match="any of 65 entries"):
        traced(MASKS["any"], takes_score=False, ids=ids)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_function_without_its_sums(name):
    """Certification compares plans of longer heads with it."""

    def score_mod(s, h, a, c):
        return torch.tanh(s + SPELLINGS[name](a[h], c[h]) * 0.5) + h

    with fake_mode():
        made_up = [torch.empty(()), torch.empty((), dtype=torch.int32), torch.empty(4, LANES), torch.empty(4, LANES)]
        graph = without_sums(value_graph(score_mod, made_up))
    found = graph(torch.tensor(0.3), torch.tensor(2, dtype=torch.int32), torch.randn(4, LANES), torch.randn(4, LANES))
    torch.testing.assert_close(found, torch.tanh(torch.tensor(0.3)) + 2)
