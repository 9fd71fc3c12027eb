"""Numbers of generated programs: the first run with every torch that CI has, all others with one of them.

What torch records of a program differs between its versions, so that some have to run with each.
"""

import pytest


def numbers(count, with_every_torch):
    """Parameters 0 to `count - 1`, of which those from `with_every_torch` on are marked `any_torch`."""
    rest = range(with_every_torch, count)
    return [*range(with_every_torch), *(pytest.param(number, marks=pytest.mark.any_torch) for number in rest)]
