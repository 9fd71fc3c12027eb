"""Bounds of an integer op's result from bounds of its arguments; the op table (optable.py) names the rule of each op.

ranges.py applies them. Rules work on pairs of integers, and know no expressions and no dtypes: each bounds the exact
result, which may be larger than any dtype holds.
"""

import itertools
import operator
from collections.abc import Callable

Interval = tuple[int, int]  # the least and the largest value
Rule = Callable[..., Interval]

UNBOUNDED: Interval = (-(2**63), 2**63)


def _hull(values: list[int]) -> Interval:
    return min(values), max(values)


def monotone(function: Callable[..., int]) -> Rule:
    """The rule of a function that is monotone in each argument, so that its extremes are at the ends."""
    return lambda *args: _hull([function(*ends) for ends in itertools.product(*args)])


sums, differences, products = monotone(operator.add), monotone(operator.sub), monotone(operator.mul)
negatives, smaller, larger = monotone(int.__neg__), monotone(min), monotone(max)


def same(x: Interval) -> Interval:
    return x


def wrapped(x: Interval) -> Interval:
    """A cast to 32 bits keeps what fits."""
    return x if x[0] >= -(2**31) and x[1] < 2**31 else (-(2**31), 2**31 - 1)


def absolute(x: Interval) -> Interval:
    return max(0, x[0], -x[1]), max(-x[0], x[1])


def chosen(condition: Interval, x: Interval, y: Interval) -> Interval:
    return min(x[0], y[0]), max(x[1], y[1])


def quotient(x: Interval, divisor: Interval) -> Interval:
    """x // d is between the quotients of the ends for d > 0, and no larger than |x| for every d but 0."""
    if divisor[0] > 0:
        return monotone(operator.floordiv)(x, divisor)
    largest = absolute(x)[1]
    return -largest, largest


def remainder(x: Interval, divisor: Interval) -> Interval:
    """x % d is between 0 and d, which excludes d itself, and is x where 0 <= x < d."""
    low, high = min(0, divisor[0] + 1), max(0, divisor[1] - 1)
    return (low, min(high, x[1])) if x[0] >= 0 and divisor[0] > 0 else (low, high)


def _power_above(*intervals: Interval) -> int:
    """The least power of two P with every value in [-P, P)."""
    return 1 << max(max(high, -low - 1, 0).bit_length() for low, high in intervals)


def bits_in_both(x: Interval, y: Interval) -> Interval:
    """x & y is at most each argument that is not negative, at most the larger one, and has no more bits than they."""
    natural = [high for low, high in (x, y) if low >= 0]
    if natural:
        return 0, min(natural)
    return -_power_above(x, y), max(x[1], y[1])


def _inverted(x: Interval) -> Interval:
    return -x[1] - 1, -x[0] - 1


def bits_in_either(x: Interval, y: Interval) -> Interval:
    """x | y is ~(~x & ~y), and no less than both where neither is negative."""
    low, high = _inverted(bits_in_both(_inverted(x), _inverted(y)))
    return (max(x[0], y[0]) if min(x[0], y[0]) >= 0 else low), high


def bits_in_one(x: Interval, y: Interval) -> Interval:
    power = _power_above(x, y)
    return (0 if min(x[0], y[0]) >= 0 else -power), power - 1


BITS = 64


def shifted_left(x: Interval, count: Interval) -> Interval:
    """x << n is x * 2 ** n, and 0 for a count that is negative or beyond the width."""
    within = max(0, min(count[0], BITS)), max(0, min(count[1], BITS))
    low, high = monotone(operator.lshift)(x, within)
    return (low, high) if within == count and count[1] < BITS else (min(low, 0), max(high, 0))
