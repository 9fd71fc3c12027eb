"""How much work certification is, in counts: ops that the host enqueues, waits for the device, and memory.

Knows nothing of what is judged, and bounds nothing by the clock.
"""

import collections
import weakref
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from cudnn_flex_compile.engine.certify import samples, slices
from cudnn_flex_compile.engine.certify.certify import certify
from cudnn_flex_compile.engine.certify.reference import ProgramReference, SubgraphReference
from cudnn_flex_compile.engine.certify.regimes import REGIMES
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, Problem, TensorSpec, dense, out_spec, output_specs
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32
from cudnn_flex_compile.scoremod.learned import with_bias
from tests.support.ready import Ready
from tests.unit.engine.certify.test_certify import CAUSAL, KV, PROGRAM, Q, StandIn, joint

pytestmark = pytest.mark.any_torch
ALL_AT_ONCE = 2**60
FIVE = tuple(regime for regime in REGIMES if not regime.extremes)
ALIBI = ir.program(ir.SCORE + ir.operand(0, F32, "h") * ir.cast(KV - Q, F32), CAUSAL)
CAPPED = lambda s, b, h, q, kv: torch.tanh(s / 20.0) * 20.0  # noqa: E731
USERS = SubgraphReference(
    score_mod=CAPPED, mask_mod=lambda b, h, q, kv: q >= kv, joint=joint(CAPPED),
    score_captured=(), mask_captured=(), captured=(), operands=lambda values, sizes, device: ([], None),
)  # fmt: skip


def standard(program=PROGRAM, operands=(), batch=2, heads=8, kv_heads=2, length=512, dim=64):
    """The forward of a call."""
    query, key = (
        TensorSpec((batch, n, length, dim), (length * n * dim, dim, n * dim, 1), torch.bfloat16)
        for n in (heads, kv_heads)
    )
    return Problem(program, FORWARD, query, key, key, out_spec(query, key), operands, dim**-0.5, 0)


class Uncounted(StandIn):
    """A plan whose own work is not part of certification's."""

    def run(self, *given):
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            super().run(*given)


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


class Waits(TorchFunctionMode):
    """Reads of the device's numbers, if the tensors were on one."""

    READS = ("tolist", "item", "__bool__", "__float__", "__int__", "__index__", "cpu", "nonzero")

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.found[getattr(function, "__name__", "")] += 1
        return function(*args, **(kwargs or {}))

    @property
    def count(self):
        return sum(self.found[name] for name in self.READS)


class Peak(TorchDispatchMode):
    """The most bytes that tensors take at a time, among those made in it."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.bytes, self.tensors = {}, collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if type(tensor) is torch.Tensor and not tensor._is_zerotensor():
                self._add(tensor)
        self.most = max(self.most, self.now)
        return found

    def _add(self, tensor):
        memory = tensor.untyped_storage()
        place = memory.data_ptr()
        if place not in self.bytes:
            self.bytes[place] = memory.nbytes()
            self.now += memory.nbytes()
        self.tensors[place] += 1
        weakref.finalize(tensor, self._drop, place)

    def _drop(self, place):
        self.tensors[place] -= 1
        if not self.tensors[place]:
            self.now -= self.bytes.pop(place)


def both(within, forward, reference, regimes=REGIMES):
    """Certifies a forward and a backward, each within such a mode."""
    found = []
    right = Uncounted(forward)
    for plan in (right, Uncounted(forward.backward())):
        with within() as mode:
            assert certify(plan, right, reference, regimes) is None
        found.append(mode)
    return found


@pytest.mark.parametrize("reference", [ProgramReference(PROGRAM), USERS], ids=["program", "functions"])
def test_the_ops_of_a_certification_are_few(reference):
    """One regime after the other took 9625 (of the functions: 9683), of which the forward 2392."""
    forward, backward = both(Ops, standard(), reference)
    assert forward.count <= 520
    assert forward.count + backward.count <= 1800


def test_a_regime_more_takes_few_ops():
    """What runs the plan and keeps what it wrote; nothing that is computed from it."""
    few, more = ([m.count for m in both(Ops, standard(), USERS, regimes)] for regimes in (FIVE[:2], FIVE))
    assert (more[0] - few[0]) / 3 <= 30
    assert (more[1] - few[1]) / 3 <= 70


def test_operands_at_their_extremes_are_a_group_of_their_own():
    slopes = (TensorSpec((1, 8, 1, 1), (8, 1, 1, 1), torch.float32),)
    forward, backward = both(Ops, standard(ALIBI, slopes), ProgramReference(ALIBI))
    assert forward.count + backward.count <= 3000


def test_the_device_is_waited_for_twice(monkeypatch):
    """Once to choose rows and columns, once for all that was found; once more where operands have extremes."""
    real = samples._usual

    def on_the_host(*given):
        with torch._C.DisableTorchFunction():
            return real(*given)

    monkeypatch.setattr(samples, "_usual", on_the_host)
    assert [m.count for m in both(Waits, standard(length=128), USERS)] == [2, 2]
    slopes = (TensorSpec((1, 8, 1, 1), (8, 1, 1, 1), torch.float32),)
    assert [m.count for m in both(Waits, standard(ALIBI, slopes, length=128), ProgramReference(ALIBI))] == [3, 3]


class Cheap(Ready):
    """Writes numbers that are not right, and takes no memory."""

    strategy, device = "cheap", torch.device("cpu")

    def __init__(self, asked):
        self.problem, self.outputs = asked, output_specs(asked)

    def run(self, tensors, operands, ints, floats):
        inputs = 3 if self.problem.direction == FORWARD else 6 + self.problem.lse_gradient
        for tensor in tensors[inputs:]:
            tensor.fill_(0.01)


def peak(asked, program, count):
    """Of certifying on so many regimes."""
    regimes = [replace(FIVE[n % 5], name=str(n)) for n in range(count)]
    with Peak() as memory:
        certify(Cheap(asked), Cheap(asked.forward()), ProgramReference(program), regimes)
    return memory.most


LEARNED = ir.program(with_bias(ir.SCORE, ir.operand(0, F32, "hqk")), CAUSAL)
OF_PAIRS = (dense(TensorSpec((1, 4, 512, 512), (), torch.float32)),)
SIZES = {"short heads": (2, 16), "long heads": (4, 256)}  # kv heads and head dim: pairs take most, or rows do


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, "with a gradient of the log-sum-exp"])
@pytest.mark.parametrize("program", [PROGRAM, LEARNED], ids=["soft cap", "learned bias"])
@pytest.mark.parametrize("size", SIZES)
def test_a_regime_takes_no_more_memory_than_is_counted(size, program, direction, monkeypatch):
    kv_heads, dim = SIZES[size]
    counted = []
    real = slices.regimes_at_once
    monkeypatch.setattr(slices, "ENTRIES_AT_ONCE", ALL_AT_ONCE)
    monkeypatch.setattr("cudnn_flex_compile.engine.certify.checks.regimes_at_once",
                        lambda slices: counted.append(slices[0].bytes) or real(slices))  # fmt: skip
    asked = standard(program, OF_PAIRS * (program is LEARNED), heads=4, kv_heads=kv_heads, dim=dim)
    if direction != FORWARD:
        asked = asked.backward(direction != BACKWARD)
    few, more = (peak(asked, program, count) for count in (10, 20))
    assert 0 < (more - few) / 10 <= max(counted)


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_regimes_that_take_much_are_computed_one_at_a_time(direction, monkeypatch):
    asked = standard(heads=4)
    asked = asked if direction == FORWARD else asked.backward()
    monkeypatch.setattr(slices, "ENTRIES_AT_ONCE", 0)
    assert peak(asked, PROGRAM, 20) <= 1.01 * peak(asked, PROGRAM, 5)


def test_how_many_regimes_fit():
    """All of a small problem, one of a large one."""

    def fitting(*each):
        return slices.regimes_at_once([slices.Slice((), (), (), n) for n in each])

    assert fitting(slices.ENTRIES_AT_ONCE // 5) == 5
    assert fitting(slices.ENTRIES_AT_ONCE // 5 + 1) == 4
    assert fitting(10 * slices.ENTRIES_AT_ONCE) == 1
    assert fitting(1, 1) == 1  # more than is computed at a time of one regime alone
