"""Judges that stand in for the GPU's in tests/unit/test_fuzz.py: apart, so that worker processes can import them.

Each fails on a property of the call, so that the simplest call that fails is known.
"""

import os
import signal
import time
from dataclasses import dataclass

import torch

from tests.fuzzing.campaign import Numbered
from tests.fuzzing.verdict import DIED, KEPT, RIGHT, SKIPPED, WRONG, Verdict
from tests.support.generated import Call

INVOLVED = Call(
    7, "torch.tanh(score * scales[h])", "((q >= kv) | (padding[b, kv] & (kv != 3)))", (200, 130), 2, torch.float16,
    as_block_mask=True, heads=4, dims=(96, 64), layout="cached", grad_layout="one number",
)  # fmt: skip


@dataclass(frozen=True)
class Involved(Numbered):
    """The one call, whatever the number."""

    def call(self) -> Call:
        return INVOLVED


def by_number(case: Call) -> Verdict:
    """0 is kept, 1 no call, 2 wrong, 3 ends its process, 4 never answers, 5 loses its device, 7 and more are right."""
    if case.number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if case.number == 4:
        time.sleep(600)
    if case.number == 6:
        raise ArithmeticError("a bug of the judge")
    verdicts = {
        0: Verdict(KEPT, "too slow", "SLOWER"),
        1: Verdict(SKIPPED, "no such call"),
        2: Verdict(WRONG, "dQ: off by 1.00e+00"),
        5: Verdict(DIED, "the CUDA context is lost", fatal=True),
    }
    return verdicts.get(case.number, Verdict(RIGHT, strategies=("chained", "dense")))


def by_mask(case: Call) -> Verdict:
    """Wrong wherever a mask reads padding at more than 16 keys."""
    wrong = case.mask is not None and "padding[b, kv]" in case.mask and case.lengths[1] > 16
    return Verdict(WRONG, "out: off by 1.00e+00") if wrong else Verdict(RIGHT, strategies=("native",))
