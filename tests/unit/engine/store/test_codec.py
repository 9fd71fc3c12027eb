"""Verdicts as bytes come back as they were, and what is no verdict is a ValueError."""

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cudnn_flex_compile.engine.plans.plan import Record
from cudnn_flex_compile.engine.problem import Error
from cudnn_flex_compile.engine.store.codec import Certified, decode, encode
from cudnn_flex_compile.reasons import Code, Reason

number = st.integers(0, 2**31 - 1)
float32 = st.floats(width=32, allow_nan=False)
numbers = st.lists(st.one_of(st.integers(-(2**31), 2**31 - 1), float32), max_size=5)
details = st.dictionaries(st.text(max_size=10), st.one_of(number, numbers, st.fixed_dictionaries({"hosts": numbers})))
leaves = st.builds(Record, st.text(), st.text(), details, st.binary(max_size=200))
plans = st.recursive(
    leaves, lambda parts: st.builds(
        Record, st.text(), st.text(), details, st.binary(max_size=20), st.lists(parts, max_size=3).map(tuple)
    ), max_leaves=5,
)  # fmt: skip
size = st.floats(0, 1)
errors = st.lists(st.builds(Error, st.sampled_from(["out", "dQ"]), size, size), max_size=3).map(tuple)
verdicts = st.one_of(
    st.builds(Certified, plans, errors), st.builds(Reason, code=st.sampled_from(Code), detail=st.text())
)  # fmt: skip


def exactly(value):
    """The types and signs of zeros, too."""
    match value:
        case dict():
            return {name: exactly(v) for name, v in value.items()}
        case list():
            return [exactly(v) for v in value]
        case float():
            return struct.pack("<d", value)
        case _:
            return value


def assert_same(one, other):
    assert exactly(one.details) == exactly(other.details)
    for a, b in zip(one.parts, other.parts, strict=True):
        assert_same(a, b)


@given(verdicts)
def test_round_trip(verdict):
    found = decode(encode(verdict))
    assert found == verdict
    if isinstance(verdict, Certified):
        assert_same(found.plan, verdict.plan)


PLAN = Record("graph", "problem", {"hosts": [-math.inf, -0.0, 3]}, b"graph")
GOOD = encode(Certified(Record("boxes", "whole", {}, b"", (PLAN, PLAN))))
BAD = {
    "nothing": b"",
    "a cut header": GOOD[:20],
    "a cut graph": GOOD[:-1],
    "more than the graphs": GOOD + b"x",
    "no JSON": GOOD.replace(b'"plan"', b"'plan'"),
    "no plan": GOOD.replace(b'"plan"', b'"plum"'),
    "a plan without a problem": GOOD.replace(b'"problem"', b'"trouble"'),
    "an unknown reason": encode(Reason(Code.SLOWER, "x")).replace(b"SLOWER", b"FASTER"),
    "a list": struct.pack("<Q", 2) + b"[]",
    "parts that are none": GOOD.replace(b'"parts": []', b'"parts": 77'),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_anything_else_is_an_error(data):
    with pytest.raises(ValueError, match=r".+"):
        decode(data)


def test_good_data_for_comparison():
    assert decode(GOOD) == Certified(Record("boxes", "whole", {}, b"", (PLAN, PLAN)))
