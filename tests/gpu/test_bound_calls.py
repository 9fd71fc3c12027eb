"""Bound calls (kernels/bound_calls.py) give what looked-up ones give, on new data, in other layouts, and in captures.

tests/unit/kernels/test_bound_calls.py has which plan runs, without a GPU.
"""

from unittest import mock

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import cache_clear
from cudnn_flex_compile.bench.mods import causal, sliding, softcap
from cudnn_flex_compile.kernels import bound_calls
from cudnn_flex_compile.ops import undispatched
from tests.gpu.test_behaviour import assert_right, draw, fresh  # noqa: F401
from tests.gpu.test_numerics import poison

LENGTH, STEPS = 256, 20
CASES = {
    "no mask": (softcap(2.0), None), "causal": (None, causal), "soft cap + window": (softcap(2.0), sliding(100)),
}  # fmt: skip
AROUND = pytest.mark.parametrize("around", [False, True], ids=["alone", "among other ops"])


@pytest.fixture(autouse=True)
def from_nothing(fresh):  # noqa: F811
    cache_clear()


def compiled(score_mod, mask_mod, around, length=LENGTH, **options):
    """The call, by Inductor's code or by none."""
    mask = mask_mod and create_block_mask(mask_mod, None, None, length, length, device="cuda")

    def call(q, k, v):
        out = flex_attention(q + 0 if around else q, k, v, score_mod, mask)
        return out + 0 if around else out

    return torch.compile(call, backend="cudnn_flex", options={"lower": "always", **options})


def runs():
    """How often calls ran bound, forward and backward."""
    found = []
    for table in (bound_calls.forwards, bound_calls.backwards):
        count = 0
        for call in table.values():
            while call is not None:
                count, call = count + call.uses.count, call.next
        found.append(count)
    return found


def draw_again(*tensors):
    with torch.no_grad():
        for tensor in tensors:
            tensor.normal_()


@AROUND
@pytest.mark.parametrize("case", CASES)
def test_each_step_is_right_on_its_own_data(case, around):
    function, qkv = compiled(*CASES[case], around), [draw(length=LENGTH) for _ in range(3)]
    grad = torch.randn_like(qkv[0])
    for _ in range(STEPS):
        poison()
        draw_again(*qkv, grad)
        out = function(*qkv)
        gradients = torch.autograd.grad(out, qkv, grad)
        assert_right(out, qkv, *CASES[case], grad, gradients)
        del out, gradients
    assert min(runs()) >= STEPS - 3, runs()


@AROUND
def test_a_bound_call_gives_every_bit_of_one_that_is_looked_up(around):
    function, qkv = compiled(*CASES["causal"], around), [draw(length=LENGTH, requires_grad=False) for _ in range(3)]
    for _ in range(STEPS):
        draw_again(*qkv)
        found = function(*qkv).clone()
        with mock.patch.object(undispatched, "_forwards", {}):
            assert torch.equal(found, function(*qkv))
    assert runs()[0] >= STEPS - 3


def test_layouts_dtypes_and_lengths_that_change():
    """One program, in turns; each bound call is for its own kind of tensors."""
    score_mod, mask_mod = CASES["no mask"]
    function, kinds = compiled(score_mod, mask_mod, True), []
    for length in (128, 256):
        kinds.append([draw(length=length, requires_grad=False) for _ in range(3)])
        kinds.append([t.contiguous() for t in kinds[-1]])
        kinds.append([kinds[-2][0], *(t.contiguous() for t in kinds[-2][1:])])
    for _ in range(4):
        for qkv in kinds:
            draw_again(*qkv)
            assert_right(function(*qkv), qkv, score_mod)
    assert runs()[0] >= 2 * len(kinds)


def test_a_capture_among_bound_calls():
    function, qkv = compiled(*CASES["causal"], True), [draw(length=LENGTH, requires_grad=False) for _ in range(3)]
    for _ in range(STEPS):
        function(*qkv)
    before, graph = runs()[0], torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*qkv)
    assert runs()[0] == before > 0
    cache_clear()  # the graph keeps its plan
    for _ in range(3):
        draw_again(*qkv)
        assert_right(function(*qkv), qkv, *CASES["causal"])
        graph.replay()
        assert_right(out, qkv, *CASES["causal"])


def test_a_profile_has_the_event_of_a_call_that_runs_bound_otherwise():
    function, qkv = compiled(*CASES["causal"], True), [draw(length=LENGTH, requires_grad=False) for _ in range(3)]
    for _ in range(STEPS):
        function(*qkv)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*qkv)
    assert any(event.key.startswith("cudnn_flex forward") for event in profile.key_averages())


def test_deterministic_algorithms_have_plans_of_their_own():
    function, qkv = compiled(*CASES["causal"], False), [draw(length=LENGTH) for _ in range(3)]
    grad = torch.randn_like(qkv[0])
    for step in range(STEPS):
        torch.use_deterministic_algorithms(step % 3 == 2)
        try:
            found = [torch.autograd.grad(function(*qkv), qkv, grad) for _ in range(2)]
        finally:
            torch.use_deterministic_algorithms(False)
        assert_right(function(*qkv), qkv, *CASES["causal"], grad, found[0])
        if step % 3 == 2:
            assert all(map(torch.equal, *found))
