"""Certification catches wrong plans and passes right ones: judged on the CPU with stand-ins for plans."""

import functools
import math
from dataclasses import replace

import pytest
import torch

from cudnn_flex_compile.engine.certify.certify import ROOM, certify
from cudnn_flex_compile.engine.certify.random_inputs import random_like
from cudnn_flex_compile.engine.certify.reference import (
    CapturedValue,
    IndexByTensors,
    ProgramReference,
    SubgraphReference,
)  # fmt: skip
from cudnn_flex_compile.engine.certify.regimes import REGIMES
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, Problem, TensorSpec, out_spec, output_specs
from cudnn_flex_compile.kernels import cpu
from cudnn_flex_compile.kernels.arguments import Arguments
from cudnn_flex_compile.passes.write.operands import operand_value
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.aten import fake_mode, joint_graph
from cudnn_flex_compile.scoremod.ir import F32, I32
from cudnn_flex_compile.scoremod.learned import with_bias
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.partition import Hoisted
from cudnn_flex_compile.scoremod.text import text
from tests.support.ready import Ready

Q, KV = ir.index("q"), ir.index("k")
CAUSAL = make("ge", Q, KV)
CAPPED = make("tanh", ir.SCORE / 20.0) * 20.0
PROGRAM = ir.program(CAPPED, CAUSAL)


def spec(heads, length, dtype=torch.bfloat16, dim=16):
    return TensorSpec((2, heads, length, dim), (length * heads * dim, dim, heads * dim, 1), dtype)


def problem(program, direction, operands=(), lengths=(70, 90), dtype=torch.bfloat16):
    query, key = spec(4, lengths[0], dtype), spec(2, lengths[1], dtype)
    return Problem(program, direction, query, key, key, out_spec(query, key), operands, 0.25, 0)


class StandIn(Ready):
    """Runs `program` on the CPU kernels, whatever the problem says, then spoils what it wrote."""

    strategy, device = "stand-in", torch.device("cpu")

    def __init__(self, problem, program=None, spoil=lambda tensors: None):
        self.problem, self.spoil = problem, spoil
        self.program = text(problem.program if program is None else program)
        self.outputs = (problem.query, problem.key, problem.value)

    def grad_lse(self, grad_lse):
        """[B, H, Sq], from the tensor that the plan is given."""
        return grad_lse.squeeze(-1)

    def run(self, tensors, operands, ints, floats):
        rest = Arguments(operands, ints, floats, self.program, self.problem.scale)
        if self.problem.direction == FORWARD:
            query, key, value, out, stats = tensors
            cpu.forward(query, key, value, rest, out, stats.squeeze(-1))
            self.spoil((out, stats))
        else:
            query, key, value, out, stats, grad, *of_lse = tensors[:-3]
            gradients = tensors[-3:]
            grad_lse = self.grad_lse(*of_lse) if of_lse else None
            found = cpu.backward(grad, grad_lse, query, key, value, out, stats.squeeze(-1), rest)
            for into, gradient in zip(gradients, found, strict=True):
                into.copy_(gradient)
            self.spoil(tuple(gradients))


def joint(score_mod, *captured, learned=()):
    """A score_mod and its derivatives; `learned` are positions among the captured tensors."""
    with fake_mode():
        places = [torch.empty((), dtype=torch.int32) for _ in range(4)]
        inputs = [torch.empty(t.shape, dtype=t.dtype, requires_grad=i in learned) for i, t in enumerate(captured)]
        inputs = [torch.empty((), requires_grad=True), *places, *inputs]
        return joint_graph(score_mod, inputs, [5 + i for i in learned])


def verdict(direction, program=PROGRAM, runs=None, spoil=lambda tensors: None, reference=None, operands=(), **how):
    forward = StandIn(problem(program, FORWARD, operands, **how))
    plan = StandIn(problem(program, direction, operands, **how), runs, spoil)
    return certify(plan, plan if direction == FORWARD else forward, reference or ProgramReference(program))


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_right_plans_pass(direction, dtype):
    assert verdict(direction, dtype=dtype) is None


@pytest.mark.parametrize("there_is_room", [True, False])
def test_extremes_for_which_a_plan_has_no_room_are_left_out(there_is_room):
    """A list of tiles for them may take gigabytes. A plan is prepared once for each set of values."""
    asked, runs = [], []

    class Preparing(StandIn):
        def prepared(self, operands, ints, floats, room=None):
            asked.append(room)
            return self if room is None or there_is_room else None

    program = ir.program(ir.SCORE * ir.operand(0, F32, "h"), CAUSAL)
    slopes = (TensorSpec((1, 4, 1, 1), (4, 1, 1, 1), torch.float32),)
    plan = Preparing(problem(program, FORWARD, slopes), spoil=lambda _: runs.append(0))
    assert certify(plan, plan, ProgramReference(program)) is None
    extremes = sum(regime.extremes for regime in REGIMES)
    assert asked == [None] + [ROOM] * extremes
    assert len(runs) == len(REGIMES) - (0 if there_is_room else extremes) > 0


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize(("deterministic", "run"), [(False, 20), (True, None), (True, 2), (True, 20)])
def test_a_deterministic_plan_gives_the_same_bits_at_each_of_twenty_runs(direction, deterministic, run):
    """Where it is asked to: it may add up in any order elsewhere, as in the last bit of one element."""
    regimes, runs = REGIMES[:1], []

    def other_bits(tensors):
        runs.append(0)
        if run is not None and len(runs) == len(regimes) + run:
            tensors[0].view(torch.int16)[0, 0, 0, 0] ^= 1

    forward, asked = (replace(problem(PROGRAM, d), deterministic=deterministic) for d in (FORWARD, direction))
    plan = StandIn(asked, spoil=other_bits)
    found = certify(plan, plan if direction == FORWARD else StandIn(forward), ProgramReference(PROGRAM), regimes)
    assert len(runs) == len(regimes) + 20 * deterministic
    if deterministic and run is not None:
        assert "20 runs differ in their bits" in found.detail
    else:
        assert found is None


def scaled(tensors, factor):
    for tensor in tensors:
        if tensor.shape[-1] > 1:
            tensor[:, :, ::8] *= factor


@pytest.mark.parametrize(("direction", "names"), [(FORWARD, ["out"]), (BACKWARD, ["dQ", "dK", "dV"])])
def test_right_plans_have_their_errors(direction, names):
    """What a plan adds is in them: here about a rounding step in some rows."""
    found = {}
    for factor in (1.0, 1.003):
        plan = StandIn(problem(PROGRAM, direction), spoil=functools.partial(scaled, factor=factor))
        forward = plan if direction == FORWARD else StandIn(problem(PROGRAM, FORWARD))
        assert certify(plan, forward, ProgramReference(PROGRAM)) is None
        found[factor] = plan.errors
    assert [error.name for error in found[1.0]] == names
    for right, off in zip(found[1.0], found[1.003], strict=True):
        assert right.stock == off.stock
        assert 0 < right.found < 2 * right.stock
        assert right.found < off.found


WRONG = {
    "no mask": ir.program(CAPPED),
    "strict mask": ir.program(CAPPED, make("gt", Q, KV)),
    "no score_mod": ir.program(ir.SCORE, CAUSAL),
    "another cap": ir.program(make("tanh", ir.SCORE / 10.0) * 10.0, CAUSAL),
}


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_programs_are_caught(direction, name):
    assert "off by" in verdict(direction, runs=WRONG[name]).detail


def unwritten_tail(tensors):
    for t in tensors:
        t[:, :, -1] = math.nan


def one_bad_row(tensors):
    tensors[0][0, 0, 64] *= 1.3


def slightly_off(tensors):
    tensors[0].mul_(1.02)


def bad_stats(tensors):
    tensors[-1][0, 0, 64] += 0.1


SPOILS = {
    FORWARD: (unwritten_tail, one_bad_row, slightly_off, bad_stats),
    BACKWARD: (unwritten_tail, one_bad_row, slightly_off),
}


@pytest.mark.parametrize(("direction", "spoil"), [(d, s) for d, all_ in SPOILS.items() for s in all_])
def test_spoiled_outputs_are_caught(direction, spoil):
    assert verdict(direction, spoil=spoil) is not None


def underflow(tensors):
    """What cuDNN 9.19 does to rows whose LSE is below -88.7: random normal scores never show it."""
    low = tensors[-1] < -88.7 if tensors[-1].dim() == 4 and tensors[-1].shape[-1] == 1 else None
    if low is not None:
        tensors[0][low.squeeze(-1)] = math.nan


def test_rows_of_very_low_scores_are_tried():
    program = ir.program(ir.SCORE, CAUSAL)
    assert "scores shifted by -100" in verdict(FORWARD, program, spoil=underflow).detail


def test_the_users_functions_are_the_reference_not_the_program():
    """A program that was traced wrongly is caught: here it has lost the score_mod's factor."""
    captured = torch.linspace(0.5, 1.5, 4)
    leaf = ir.capture(0, F32)
    hoisted = Hoisted(make("gather", leaf, ir.index("h")), torch.float32)
    right = ir.program(ir.SCORE * (ir.operand(0, F32, "h") * 2.0))
    reference = SubgraphReference(
        score_mod=lambda s, b, h, q, kv, table: s * (table[h] * 2),
        mask_mod=lambda b, h, q, kv: b.new_ones((), dtype=torch.bool),
        joint=joint(lambda s, b, h, q, kv, table: s * (table[h] * 2), captured),
        score_captured=(0,),
        mask_captured=(),
        captured=(CapturedValue(TensorSpec.of(captured)),),
        operands=lambda values, sizes, device: ([operand_value(hoisted, lambda _: values[0], sizes, device)], None),
    )
    operands = (TensorSpec((1, 4, 1, 1), (4, 1, 1, 1), torch.float32),)
    for direction in (FORWARD, BACKWARD):
        assert verdict(direction, right, operands=operands, reference=reference) is None
        lost = ir.program(ir.SCORE * ir.operand(0, F32, "h"))
        assert verdict(direction, right, runs=lost, operands=operands, reference=reference) is not None


def test_rows_with_no_visible_key():
    program = ir.program(ir.SCORE, make("ge", KV - Q, ir.const(40, I32)))
    for direction in (FORWARD, BACKWARD):
        assert verdict(direction, program) is None

    def mean_of_values(tensors):  # what a fill of -1e9 gives
        tensors[0][tensors[1].squeeze(-1) == -math.inf] = 1.0

    assert "out" in verdict(FORWARD, program, spoil=mean_of_values).detail


def test_a_backward_for_another_layout_of_the_gradient():
    backward = problem(PROGRAM, BACKWARD)
    contiguous = TensorSpec(backward.out.shape, (4 * 70 * 16, 70 * 16, 16, 1), torch.bfloat16)
    plan = StandIn(replace(backward, grad=contiguous))
    assert certify(plan, StandIn(problem(PROGRAM, FORWARD)), ProgramReference(PROGRAM)) is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_integers_are_drawn_within_their_dtype(dtype):
    spec = TensorSpec((1000,), (1,), dtype)
    drawn = random_like(spec, torch.Generator().manual_seed(0), 300)
    largest = min(300, torch.iinfo(dtype).max - 1)
    assert drawn.min() >= 0
    assert largest - 10 <= drawn.max() <= largest


def half_detached(score, b, h, q, kv, table):
    return score + table[h, q] * 0.5 + table[h, q].detach() * 0.5


def half_without_gradients(score, b, h, q, kv, table):
    with torch.no_grad():
        half = table[h, q] * 0.5
    return score + half + table[h, q] * 0.5


def attached(score, b, h, q, kv, table):
    return score + table[h, q]


@pytest.mark.parametrize("score_mod", [half_detached, half_without_gradients, attached])
@pytest.mark.parametrize("attached_half", [0.5, 1.0])
def test_a_captured_tensor_whose_gradient_is_lowered_wrongly_is_caught(score_mod, attached_half):
    """Each plan gives the right dBias: wrong is what autograd makes of it outside."""
    table, entry = torch.empty(4, 70), make("gather", ir.capture(0, F32), ir.index("h"), ir.index("q"))
    rest = make("stop", entry) * (1.0 - attached_half)
    hoisted = Hoisted(entry * attached_half + rest, torch.float32, learned=True)
    program = ir.program(with_bias(ir.SCORE, ir.operand(0, F32, "hqk")))
    reference = SubgraphReference(
        score_mod=score_mod, mask_mod=lambda b, h, q, kv: b.new_ones((), dtype=torch.bool),
        joint=joint(score_mod, table, learned=(0,)), learned=(0,), score_captured=(0,), mask_captured=(),
        captured=(CapturedValue(TensorSpec.of(table)),),
        operands=lambda values, sizes, device: ([operand_value(hoisted, lambda _: values[0], sizes, device)], None),
    )  # fmt: skip
    operands = (TensorSpec((1, 4, 70, 90), (4 * 70 * 90, 70 * 90, 90, 1), torch.float32),)
    forward, backward = (problem(program, direction, operands) for direction in (FORWARD, BACKWARD))
    found = certify(WithBias(backward), StandIn(forward), reference)
    right = (attached_half == 1.0) == (score_mod is attached)
    assert found is None if right else "what the score_mod captured is off by" in found.detail


class WithBias(StandIn):
    """The CPU kernels, with the gradient of the learned operand."""

    def __init__(self, problem):
        super().__init__(problem)
        self.outputs = output_specs(problem)

    def run(self, tensors, operands, ints, floats):
        query, key, value, out, stats, grad, *gradients = tensors
        rest = Arguments(operands, ints, floats, self.program, self.problem.scale)
        found = cpu.backward(grad, None, query, key, value, out, stats.squeeze(-1), rest)
        for into, gradient in zip(gradients, found, strict=True):
            into.copy_(gradient)


STOPPED = {
    "detach": lambda s, b, h, q, kv: torch.tanh(s).detach() + s,
    "no_grad": lambda s, b, h, q, kv: without_gradients(s) + s,
    "an autograd.Function": lambda s, b, h, q, kv: Doubled.apply(s),
}


@torch.no_grad()
def without_gradients(score):
    return torch.tanh(score)


class Doubled(torch.autograd.Function):
    """tanh(x) + x, with the gradient of x."""

    @staticmethod
    def forward(ctx, x):
        return torch.tanh(x) + x

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize("name", STOPPED)
def test_gradients_that_a_score_mod_stops_are_the_reference(name):
    mod = STOPPED[name]
    value = lambda s, b, h, q, kv: torch.tanh(s) + s  # noqa: E731
    reference = SubgraphReference(
        score_mod=value, mask_mod=lambda b, h, q, kv: q >= kv, joint=joint(mod),
        score_captured=(), mask_captured=(), captured=(), operands=lambda values, sizes, device: ([], None),
    )  # fmt: skip
    tanh = make("tanh", ir.SCORE)
    stopped = ir.program(make("tanh", make("stop", ir.SCORE)) + ir.SCORE, CAUSAL)
    assert verdict(BACKWARD, stopped, reference=reference) is None
    assert "dQ is off by" in verdict(BACKWARD, ir.program(tanh + ir.SCORE, CAUSAL), reference=reference).detail


def test_indices_beyond_a_captured_tensor_read_its_last_entry():
    """Functions are evaluated at pairs at which stock attention never is; on a GPU, such an index ends the process."""
    rows, far = torch.arange(24).view(2, 3, 4), torch.tensor(9)
    with IndexByTensors():
        assert rows[far, far, far] == rows[-1, -1, -1]
        assert rows[far, 0].equal(rows[-1, 0])
        assert rows[-2].equal(rows[0])
        assert rows[:0][far, far].equal(torch.zeros(4))
