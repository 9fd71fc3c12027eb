"""One problem as several plans over boxes of its pairs: what they write together is dense attention.

Knows nothing of cuDNN: the plan of a box computes it in float64 on the CPU, from the program and the views it is given.
"""

import ctypes
import math
from dataclasses import replace

import pytest
import torch

from cudnn_flex_compile.engine.plans.box_plan import BoxPlan, assemble_boxes, divided
from cudnn_flex_compile.engine.problem import (
    BACKWARD,
    FORWARD,
    Problem,
    TensorSpec,
    dense,
    out_spec,
    output_specs,
    stats_spec,
)
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import environment, evaluate
from cudnn_flex_compile.scoremod.ir import F32, I32
from cudnn_flex_compile.scoremod.masks.boxes import Box, boxes, unshifted
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.masks.intervals import VIEWS
from cudnn_flex_compile.scoremod.masks.linear import KV, Q
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.partition import partition
from tests.support.mask_sources import normal

BATCH, HEADS, KV_HEADS, DIM, VALUE_DIM, SCALE = 2, 4, 2, 8, 16, 0.25
LENGTHS = (40, 50)
SCORES = {
    "plain": ir.SCORE,
    "positions": make("tanh", ir.SCORE / 5.0) * 5.0 + ir.cast(Q - KV, F32) * 0.125 + ir.operand(0, F32, "bh"),
    "numbers": ir.SCORE * ir.scalar(0, F32) + ir.cast(make("min", KV, ir.scalar(0, I32)), F32) * 0.25,
}
MASKS = {
    "prefix-LM": "(q >= kv) | (kv < 12)",
    "sinks and a window": "(q >= kv) & ((q - kv <= 9) | (kv < 4))",
    "symmetric window": "(q - kv).abs() <= 6",
    "strict causal": "q > kv",
    "shifted causal": "q + 5 >= kv",
    "shifted causal, the other way": "q - 5 >= kv",
    "window alone": "q - kv <= 7",
    "two strips": "(kv < 6) | (kv >= 44)",
}
DIVIDED = {  # boxes of any rows and columns: top, bottom, left, right, lower, upper
    "rows and columns without pairs": [Box(10, 30, 8, 20), Box(2, 5, 30, 35)],
    "rows of two parts, and of one": [Box(5, 25, 0, 10), Box(15, 38, 10, 30, 0), Box(0, 3, 40, 50)],
    "columns of two parts, and of one": [Box(0, 10, 5, 25), Box(10, 40, 15, 45, None, 0)],
    "an overlap of later parts": [Box(0, 8, 0, 8), Box(4, 20, 8, 20), Box(12, 30, 20, 40), Box(26, 36, 4, 12)],
}
OPERANDS = [torch.linspace(-1, 1, BATCH * HEADS, dtype=torch.float64).view(BATCH, HEADS, 1, 1)]
INTS, FLOATS = [31], [torch.tensor(0.75, dtype=torch.float64)]


def attention(query, key, value, program):
    """out and natural log-sum-exp [B, H, Sq, 1] in float64, by the interpreter; a row without pairs is 0 and -inf."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    raw = query @ key.mT * SCALE
    axes = {a: torch.arange(n, dtype=torch.int32).view(VIEWS[a]) for a, n in zip("bhqk", raw.shape, strict=True)}
    leaf = environment(raw, axes, dict(enumerate(OPERANDS)), dict(enumerate(INTS)), {0: float(FLOATS[0])})
    visible = evaluate(program.mask, leaf, high=True)
    modified = torch.where(visible, evaluate(program.score, leaf, high=True), -math.inf)
    lse = modified.logsumexp(-1, keepdim=True)
    weights = torch.where(lse == -math.inf, 0.0, torch.exp(modified - lse))
    return weights @ value, lse, modified, key, value


def tensor_at(address, spec):
    """The memory at an address, in a layout."""
    count = 1 + sum((n - 1) * step for n, step in zip(spec.shape, spec.stride, strict=True))
    memory = (ctypes.c_byte * (count * spec.dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=spec.dtype).as_strided(spec.shape, spec.stride)


class StandIn:
    """The plan of a box. It insists on the layouts that it was built for, and on outputs that nobody else writes to."""

    strategy = "stand-in"

    def __init__(self, program, problem):
        assert problem.program is program
        self.program, self.problem, self.outputs, self.runs = program, problem, output_specs(problem), 0

    def run_at(self, addresses, operands, ints, floats):
        assert (operands, ints, floats) == (OPERANDS, INTS, FLOATS)
        self.runs += 1
        p = self.problem
        inputs = [p.query, p.key, p.value]
        backward = [*inputs, p.out, stats_spec(p), p.grad, *self.outputs]
        specs = [*inputs, *self.outputs] if p.direction == FORWARD else backward
        tensors = [tensor_at(address, spec) for address, spec in zip(addresses, specs, strict=True)]
        (self.forward if p.direction == FORWARD else self.backward)(*tensors)

    def forward(self, query, key, value, out, stats):
        found, lse, *_ = attention(*(t.double() for t in (query, key, value)), self.program)
        out.copy_(found)
        stats.copy_(lse)

    def backward(self, query, key, value, out, stats, grad, *gradients):
        """As flash attention's: weights from the given log-sum-exp, row sums from the given output."""
        leaves = [t.double().requires_grad_() for t in (query, key, value)]
        *_, modified, _, values = attention(*leaves, self.program)
        stats, grad = stats.double(), grad.double()
        weights = torch.where(stats == -math.inf, 0.0, torch.exp(modified.detach() - stats))
        row_sum = (grad * out.double()).sum(-1, keepdim=True)
        of_scores = weights * (grad @ values.detach().mT - row_sum)
        visible = modified.detach() != -math.inf
        loss = (torch.where(visible, modified, 0.0) * of_scores).sum() + ((weights @ values) * grad).sum()
        for gradient, found in zip(gradients, torch.autograd.grad(loss, leaves), strict=True):
            gradient.copy_(found)


def spec(heads, length, dim, layout):
    strided = TensorSpec((BATCH, heads, length, dim), (length * heads * dim, dim, heads * dim, 1), torch.float32)
    return strided if layout == "BSHD" else dense(strided)


def problem_of(program, direction, layout, heads=HEADS):
    query, key, value = (
        spec(*of, layout)
        for of in ((heads, LENGTHS[0], DIM), (KV_HEADS, LENGTHS[1], DIM), (KV_HEADS, LENGTHS[1], VALUE_DIM))
    )
    operands = (TensorSpec.of(OPERANDS[0]),)
    forward = Problem(program, FORWARD, query, key, value, out_spec(query, value), operands, SCALE, 0)
    return forward if direction == FORWARD else forward.backward()


def in_parts(program, problem, mask):
    """The plan, and those of its boxes."""
    found = DIVIDED.get(mask) or boxes(split(program.mask), problem.lengths)
    found = unshifted(found) if problem.direction == BACKWARD and mask not in DIVIDED else found
    built = []

    def build(local, part):
        built.append(StandIn(local, part))
        return built[-1]

    plan = assemble_boxes(problem, program, found, build)
    assert isinstance(plan, BoxPlan)
    assert len(built) == len(found)
    return plan, built


def drawn(of):
    values = torch.randn(of.shape, generator=torch.Generator().manual_seed(sum(of.shape)))
    return of.empty("cpu").copy_(values)


def poisoned(of):
    return of.empty("cpu").fill_(math.nan)


def program_of(score, mask):
    if mask in MASKS:
        return ir.program(SCORES[score], partition(normal(MASKS[mask]))[0].mask)
    union = ir.FALSE
    for box in DIVIDED[mask]:
        inside = make("and", make("ge", Q, ir.const(box.top, I32)), make("gt", ir.const(box.bottom, I32), Q))
        for bound in box.bounds():
            inside = make("and", inside, bound.predicate())
        union = make("or", union, inside)
    return ir.program(SCORES[score], union)


CASES = [
    (mask, score, layout) for mask in (*MASKS, *DIVIDED) for score, layout in (("plain", "BSHD"), ("positions", "BHSD"))
]
CASES += [("prefix-LM", "numbers", "BSHD"), ("sinks and a window", "positions", "BSHD")]


@pytest.mark.parametrize("stats", [True, False])
@pytest.mark.parametrize(("mask", "score", "layout"), CASES)
def test_forward(mask, score, layout, stats):
    program = program_of(score, mask)
    problem = replace(problem_of(program, FORWARD, layout), stats=stats)
    plan, built = in_parts(program, problem, mask)
    query, key, value = (drawn(s) for s in (problem.query, problem.key, problem.value))
    out, lse = (poisoned(s) for s in plan.outputs)
    plan.run((query, key, value, out, *[lse][: 1 if stats else 0]), OPERANDS, INTS, FLOATS)
    expected, expected_lse, *_ = attention(query.double(), key.double(), value.double(), program)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    if stats:
        assert torch.equal(lse == -math.inf, expected_lse == -math.inf)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    assert [part.runs for part in built] == [1] * len(built)


@pytest.mark.parametrize(("mask", "score", "layout"), CASES)
def test_backward(mask, score, layout):
    """Gradients are written over NaN, in the layouts of the whole problem."""
    program = program_of(score, mask)
    problem = problem_of(program, BACKWARD, layout)
    problem = replace(problem, grad=dense(problem.out))
    plan, built = in_parts(program, problem, mask)
    leaves = [drawn(s).double().requires_grad_() for s in (problem.query, problem.key, problem.value)]
    query, key, value = (drawn(s) for s in (problem.query, problem.key, problem.value))
    whole, lse, *_ = attention(*leaves, program)
    grad = drawn(problem.grad)
    expected = torch.autograd.grad((whole * grad.double()).sum(), leaves)
    expected = [e.nan_to_num() for e in expected]  # autograd's own, of rows without pairs
    out = problem.out.empty("cpu").copy_(whole.detach())
    gradients = [poisoned(s) for s in plan.outputs]
    stats = lse.detach().float()
    plan.run((query, key, value, out, stats, grad, *gradients), OPERANDS, INTS, FLOATS)
    for found, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-5)
    assert [part.runs for part in built] == [1] * len(built)


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_problems_of_boxes_keep_the_rest(direction):
    program = program_of("plain", "prefix-LM")
    problem = replace(problem_of(program, direction, "BSHD"), stats=False, deterministic=True)
    plan, built = in_parts(program, problem, "prefix-LM")
    assert plan.problem is problem
    assert plan.outputs == output_specs(problem)
    assert plan.strategy == "parts (stand-in, stand-in)"
    for part in built:
        assert part.problem.stats
        assert part.problem.deterministic
        written = [part.problem.out] if direction == FORWARD else part.problem.gradients
        assert all(spec == dense(spec) for spec in written) or part is built[0], "what is merged in is dense"
        assert (part.problem.scale, part.problem.operands, part.problem.direction) == (
            SCALE,
            problem.operands,
            direction,
        )


@pytest.mark.parametrize(
    ("source", "lengths", "parts"),
    [
        ("(q >= kv) | (kv < 512)", (4096, 4096), (2, 2)), ("(q >= kv) | (kv < 512)", (128, 128), (0, 0)),
        ("(q >= kv) | (kv < 4090)", (4096, 4096), (0, 0)), ("(q - kv).abs() <= 256", (4096, 4096), (0, 2)),
        ("(q >= kv) & ((q - kv <= 256) | (kv < 4))", (4096, 4096), (2, 2)), ("q >= kv", (4096, 4096), (0, 0)),
        ("q + 1 >= kv", (4096, 4096), (0, 2)), ("kv < 9999", (4096, 4096), (0, 0)),
    ],
)  # fmt: skip
def test_what_is_faster_in_parts(source, lengths, parts):
    """Forward and backward: how many, 0 where one plan is as fast."""
    mask = partition(normal(source))[0].mask
    for direction, expected in zip((FORWARD, BACKWARD), parts, strict=True):
        assert len(divided(ir.program(SCORES["positions"], mask), lengths, direction) or []) == expected
        along_keys = ir.program(ir.SCORE + ir.operand(0, F32, "k"), mask)
        assert divided(along_keys, lengths, direction) is None, "a part would need its own copy of the operand"


def test_a_box_without_a_plan_is_a_reason():
    program = program_of("plain", "prefix-LM")
    problem, reason = problem_of(program, FORWARD, "BSHD"), Reason(Code.SHAPE_REFUSED, "no engine")
    found, tried = boxes(split(program.mask), problem.lengths), []
    build = lambda local, part: tried.append(part) or reason  # noqa: E731
    assert assemble_boxes(problem, program, found, build) is reason
    assert len(tried) == 1
