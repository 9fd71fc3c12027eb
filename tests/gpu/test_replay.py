"""Launches that are replayed as CUDA graphs give what fresh ones give, on new data at old addresses."""

import gc
import threading

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import cache_clear
from cudnn_flex_compile.bench.mods import alibi, causal, prefix_lm, sliding, softcap
from cudnn_flex_compile.engine.launch.replay import FREE_RECORDINGS, RECORD_AFTER
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.store.plan_cache import CachedPlan
from tests.gpu.test_behaviour import assert_right, compiled, draw, fresh  # noqa: F401
from tests.gpu.test_numerics import poison
from tests.support.launched import launched

LENGTH, HEADS, STEPS = 256, 4, 3 * RECORD_AFTER
MIB = 2**20
pool = engine.graph_pool


def pairs(score, b, h, q, kv):
    return score + torch.sin(q * kv / 100.0)


CASES = {
    "causal": lambda: (None, causal),
    "soft cap + window": lambda: (softcap(2.0), sliding(100)),
    "ALiBi": lambda: (alibi(HEADS, "cuda"), causal),
    "a bias over pairs": lambda: (pairs, None),
    "several plans": lambda: (None, prefix_lm(100)),
}
LENGTHS = {"several plans": 1024}  # from which on several are faster than one; the others' is LENGTH
PLANS = {"several plans": 2}


@pytest.fixture(autouse=True)
def from_nothing(fresh):  # noqa: F811
    pool.reset()


def call(score_mod, mask_mod, length=LENGTH):
    """Without interval kernels, whose launches are not replayed: these cases are about plans of cuDNN."""
    mask = mask_mod and create_block_mask(mask_mod, None, None, length, length, device="cuda")
    return compiled(lambda q, k, v: flex_attention(q, k, v, score_mod, mask), lower="always", tile_lists=False)


def called(case, requires_grad):
    """The case's functions, the call compiled, and inputs."""
    mods, length = CASES[case](), LENGTHS.get(case, LENGTH)
    return mods, call(*mods, length), [draw(length=length, requires_grad=requires_grad) for _ in range(3)]


def replayed():
    """The plans that have launches to replay, those of which others are made among them."""
    ready = [found for found in engine.plans.values() if isinstance(found, CachedPlan)]
    found = [each.plan.parts or (each.plan,) for each in ready]
    return [plan for plans in found for plan in plans if plan._replays.graphs]


def draw_again(*tensors):
    with torch.no_grad():
        for tensor in tensors:
            tensor.normal_()


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", CASES)
def test_each_step_is_right_on_its_own_data(case, training):
    mods, function, qkv = called(case, training)
    grad, counts = torch.randn_like(qkv[0]), []
    for _ in range(STEPS):
        poison()
        draw_again(*qkv, grad)
        out = function(*qkv)
        gradients = torch.autograd.grad(out, qkv, grad) if training else None
        assert_right(out, qkv, *mods, grad, gradients)
        del out, gradients
        counts.append(pool.replays)
    assert counts[-1] - counts[STEPS // 2] >= 1 + training, counts  # an allocator may give other addresses at a step
    assert len(replayed()) >= PLANS.get(case, 1) * (1 + training)


@pytest.mark.parametrize("case", CASES)
def test_a_replay_gives_every_bit_of_a_launch(case):
    _, function, qkv = called(case, requires_grad=False)
    for _ in range(STEPS):
        draw_again(*qkv)
        found = function(*qkv).clone()
        with launched():
            assert torch.equal(found, function(*qkv))
    assert pool.replays
    assert len(replayed()) >= PLANS.get(case, 1)


def test_a_gradient_of_the_log_sum_exp():
    def attention(q, k, v):
        return flex_attention(q, k, v, softcap(2.0), return_lse=True)

    function, qkv = compiled(attention, lower="always"), [draw() for _ in range(3)]
    grads = torch.randn_like(qkv[0]), torch.randn(qkv[0].shape[:3], device="cuda")
    function(*qkv)
    for _ in range(STEPS):
        draw_again(*qkv, *grads)
        found = [g.clone() for g in torch.autograd.grad(function(*qkv), qkv, grads)]
        with launched():
            expected = torch.autograd.grad(function(*qkv), qkv, grads)
        for f, e in zip(found, expected, strict=True):
            assert (f - e).norm() <= 1e-3 * e.norm()  # cuDNN adds up dQ in any order
        del found, expected
    assert pool.replays


def test_captured_numbers_that_change_are_read_at_each_call():
    """They are in host memory, where addresses come back, too."""

    def attention(q, k, v, cap):
        return flex_attention(q, k, v, lambda s, b, h, qi, ki: torch.tanh(s / cap) * cap)

    function, qkv = compiled(attention, lower="always"), [draw(requires_grad=False) for _ in range(3)]
    for cap in [1.0, 2.0, *(5.0, 1.5) * 2 * RECORD_AFTER]:
        assert_right(function(*qkv, cap), qkv, softcap(cap))


def test_threads_with_streams_of_their_own():
    mods, wrong = CASES["soft cap + window"](), []
    function = call(*mods)

    def work():
        try:
            torch.cuda.set_device(0)
            with torch.cuda.stream(torch.cuda.Stream()):
                qkv, grad = [draw() for _ in range(3)], torch.randn(2, HEADS, LENGTH, 64, device="cuda").bfloat16()
                for _ in range(STEPS):
                    draw_again(*qkv, grad)
                    out = function(*qkv)
                    assert_right(out, qkv, *mods, grad, torch.autograd.grad(out, qkv, grad))
                    del out
        except BaseException as error:  # raised again below
            wrong.append(error)

    out = function(*(draw() for _ in range(3)))
    out.sum().backward()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]
    assert pool.replays


def test_a_capture_by_the_user_among_replays():
    mods = CASES["soft cap + window"]()
    function, qkv = call(*mods), [draw(requires_grad=False) for _ in range(3)]
    for _ in range(STEPS):
        function(*qkv)
    before = pool.replays
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*qkv)
    assert pool.replays == before > 0
    for _ in range(3):
        draw_again(*qkv)
        assert_right(function(*qkv), qkv, *mods)
        graph.replay()
        assert_right(out, qkv, *mods)


def used():
    """Bytes of the device that are in use, by any process, beyond what torch holds in this one."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def test_graphs_take_little_memory_which_is_used_again(alone):
    """The driver tells what is in use on the device, not by whom."""
    function = call(*CASES["soft cap + window"]())
    layers = [[draw() for _ in range(3)] for _ in range(FREE_RECORDINGS // 2)]
    grad = torch.randn_like(layers[0][0])

    def step():
        for qkv in layers:
            torch.autograd.grad(function(*qkv), qkv, grad)

    step()
    before, held = used(), []
    for _ in range(4):
        for _ in range(2 * RECORD_AFTER):
            step()
        graphs = sum(len(replays.graphs) for replays in pool.plans)
        assert graphs >= FREE_RECORDINGS
        held.append(used() - before)
        cache_clear()
        gc.collect()
        pool.recordings = 0
        step()
    print(f"{graphs} graphs take {held[0] / graphs / MIB:.3f} MiB each, in the end {held[-1] / graphs / MIB:.3f} MiB")
    assert held[0] <= graphs * MIB / 4
    assert held[-1] <= 1.5 * held[0]


def test_graphs_go_with_their_plans():
    function, qkv = call(*CASES["causal"]()), [draw(requires_grad=False) for _ in range(3)]
    gc.collect()
    kept = len(pool.plans)  # those of plans that a CUDA graph captured
    for _ in range(STEPS):
        function(*qkv)
    assert len(pool.plans) == kept + 1
    cache_clear()
    gc.collect()
    assert len(pool.plans) == kept


def test_addresses_that_never_come_back():
    """All is launched, nothing recorded."""
    function = call(*CASES["causal"]())
    kept = []
    for _ in range(STEPS):
        qkv = [draw(requires_grad=False) for _ in range(3)]
        kept.append((qkv, function(*qkv)))
    assert pool.recordings == 0
    for qkv, out in kept:
        assert_right(out, qkv, *CASES["causal"]())
