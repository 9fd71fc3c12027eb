"""attn-gym's masks and mods on the CPU: no further off than eager flex_attention, and lowered as docs/models.md says.

Knows nothing of which are lowered: the table is generated.
"""

import warnings

import pytest
import torch

from cudnn_flex_compile.reasons import Code
from tests.support import gym, gym_table
from tests.support.docs_tables import shown
from tests.support.gym import CASES

STALE = "the table in docs/models.md is out of date; regenerate it: python3 -m tests.support.gym_table --write"


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def table():
    return shown(*gym_table.PAGE)


def furthest(found, exact):
    """The largest error of a row: one pair that is wrongly visible or hidden shows in it."""
    return float((found.double() - exact).norm(dim=-1).max())


@pytest.mark.parametrize("name", CASES)
def test_numbers_and_verdict(name, table):
    case = CASES[name](gym_table.LENGTH, "cpu")
    query, key, value, grad = gym.inputs(case, "cpu")
    exact, stock = (gym.reference(case, query, key, value, grad, exact=e) for e in (True, False))
    assert all(bool(t.isfinite().all()) for t in exact[2:])
    with torch.no_grad():
        eager = gym.call_of(case, "cpu")(query, key, value)
    assert furthest(eager, exact[0]) <= 2 * furthest(stock[0], exact[0]) + 1e-6, "the reference is another function"
    out, call = gym_table.compiled(name)
    assert furthest(out, exact[0]) <= 2 * furthest(eager, exact[0]) + 1e-6
    if call.reason is not None:
        assert call.reason.code is not Code.INTERNAL, str(call.reason)
        assert call.reason.detail
    generated, listed = gym_table.row(name, call), [r for r in table.splitlines() if r.startswith(f"| {name} |")]
    assert listed == [generated], STALE


def test_the_table_has_one_row_for_each_case(table):
    head, rows = table.splitlines()[:2], table.splitlines()[2:]
    assert head == gym_table.HEAD, STALE
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(CASES), STALE
