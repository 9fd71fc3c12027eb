"""Verdicts as bytes come back as they were, and what is no verdict is a ValueError."""

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudnn_flex_compile.engine.problem import Binding, Error
from cudnn_flex_compile.engine.store.codec import Certified, StoredPlan, decode, encode
from cudnn_flex_compile.reasons import Code, Reason

number = st.integers(0, 2**31 - 1)
positions = st.lists(number, max_size=4).map(tuple)
float32 = st.floats(width=32, allow_nan=False)
bindings = st.builds(
    Binding,
    strategy=st.text(max_size=10),
    uids=st.lists(number, min_size=1, max_size=12).map(tuple),
    operands=positions,
    ints=positions,
    floats=positions,
    hosts=st.lists(st.one_of(st.integers(-(2**31), 2**31 - 1), float32), max_size=5).map(tuple),
    filled=positions,
)
plans = st.builds(StoredPlan, problem=st.text(), binding=bindings, workspace=number, data=st.binary(max_size=200))
size = st.floats(0, 1)
errors = st.lists(st.builds(Error, st.sampled_from(["out", "dQ"]), size, size), max_size=3).map(tuple)
verdicts = st.one_of(
    st.builds(
        Certified, plans.map(lambda p: (p,)), in_parts=st.just(False), around=st.sampled_from(["", "folded"]),
        errors=errors,
    ),
    st.builds(Certified, st.lists(plans, min_size=1, max_size=4).map(tuple), in_parts=st.just(True), errors=errors),
    st.builds(Reason, code=st.sampled_from(Code), detail=st.text()),
)


def exactly(numbers):
    return [(type(n), struct.pack("<d", n) if isinstance(n, float) else n) for n in numbers]


@given(verdicts)
def test_round_trip(verdict):
    found = decode(encode(verdict))
    assert found == verdict
    if isinstance(verdict, Certified):
        for a, b in zip(found.plans, verdict.plans, strict=True):
            assert exactly(a.binding.hosts) == exactly(b.binding.hosts), "types and signs of zeros, too"


PLAN = StoredPlan("problem", Binding("chained", (1, 2), hosts=(-math.inf, -0.0, 3)), 16, b"graph")
GOOD = encode(Certified((PLAN,)))
BAD = {
    "nothing": b"",
    "a cut header": GOOD[:20],
    "a cut graph": GOOD[:-1],
    "more than the graph": GOOD + b"x",
    "no JSON": GOOD.replace(b'"plans"', b"'plans'"),
    "no plans": GOOD.replace(b'"plans"', b'"plant"'),
    "an unknown field": GOOD.replace(b'"uids"', b'"uidz"'),
    "a field too few": GOOD.replace(b', "workspace": 16', b" " * len(b', "workspace": 16')),
    "an unknown reason": encode(Reason(Code.SLOWER, "x")).replace(b"SLOWER", b"FASTER"),
    "a list": struct.pack("<Q", 2) + b"[]",
    "several plans of one problem": encode(Certified((PLAN, PLAN))),
    "no plan": encode(Certified(())),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_anything_else_is_an_error(data):
    with pytest.raises(ValueError, match=r".+"):
        decode(data)


def test_good_data_for_comparison():
    assert decode(GOOD) == Certified((PLAN,))
