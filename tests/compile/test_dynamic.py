"""Shapes that change: one graph of ours for all of them, and one plan for each, on the CPU.

Plans are stand-ins (tests/support/stand_in.py); tests/gpu/test_dynamic.py has real ones. Numbers are the CPU kernel's.
"""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import cache_info
from cudnn_flex_compile.bench.mods import causal
from cudnn_flex_compile.config import Policy
from cudnn_flex_compile.engine.certify.regimes import REGIMES
from cudnn_flex_compile.engine.choose import OF_SHAPES
from cudnn_flex_compile.engine.find_plan import find_plan
from cudnn_flex_compile.engine.key import Meta, forward_key
from cudnn_flex_compile.engine.problem import TensorSpec
from cudnn_flex_compile.kernels import cpu
from cudnn_flex_compile.passes import contenders
from cudnn_flex_compile.passes.decide import candidate
from cudnn_flex_compile.passes.read import programs
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.report.report import collect
from tests.support import dense, stand_in

OPTIONS = {"inner_backend": "aot_eager"}
LENGTHS = (64, 100, 128, 192, 200, 256, 100)
BATCH, HEADS, DIM = 5, 2, 24  # all sizes differ: Dynamo takes equal ones for the same


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """Calls of CPU tensors ask for plans as those of CUDA tensors do, when they are compiled and when they run."""
    found, forward = stand_in.install(monkeypatch), cpu.forward
    torch._dynamo.reset()
    programs.clear()
    torch.manual_seed(0)

    def judge(given):
        call = candidate.forward_call(given, given.running, stand_in.CUDA)
        return candidate._certified(given, call, candidate.problem_of(call))

    def run(query, keys, value, given, *outputs):
        metas = [Meta(TensorSpec.of(t), stand_in.CUDA) for t in (query, keys, value, *given.operands)]
        key = forward_key(given.program, *metas[:3], metas[3:], given.scale, False, policy=found.policy)
        found.asked.append(find_plan(key))
        forward(query, keys, value, given, *outputs)

    monkeypatch.setattr(contenders, "plan_or_reason", judge)
    monkeypatch.setattr(cpu, "forward", run)
    with torch.no_grad():
        yield found


def compiled(function, dynamic=None, **options):
    return torch.compile(function, backend="cudnn_flex", dynamic=dynamic, options={**OPTIONS, **options})


def soft_cap(score, b, h, q, kv):
    return torch.tanh(score / 3.0) * 3.0


def capped(q, k, v):
    return flex_attention(q, k, v, soft_cap)


def draw(queries, keys=None, batch=BATCH):
    lengths = (queries, keys or queries, keys or queries)
    return [torch.randn(batch, n, HEADS, DIM, dtype=torch.bfloat16).transpose(1, 2) for n in lengths]


def assert_right(out, qkv, mask_mod=None):
    expected, _ = dense.attention(*qkv, soft_cap, mask_mod, DIM**-0.5, True)
    assert (out - expected).norm() <= 8e-3 * expected.norm()


# Arguments of draw, and which dimensions of which tensors change.
SHAPES = {
    "lengths": ([(n, n) for n in LENGTHS], {0: 2, 1: 2, 2: 2}),
    "query lengths": ([(n, 96) for n in LENGTHS], {0: 2}),
    "key lengths": ([(96, n) for n in LENGTHS], {1: 2, 2: 2}),
    "batches": ([(64, 64, n) for n in (5, 3, 4, 7, 3)], {0: 0, 1: 0, 2: 0}),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("marked", [False, True], ids=["dynamic=True", "mark_dynamic"])
def test_one_graph_and_a_plan_for_each_shape(name, marked, backend):
    shapes, changing = SHAPES[name]
    function = compiled(capped, dynamic=None if marked else True)
    with collect() as report:
        for shape in shapes:
            qkv = draw(*shape)
            for tensor, dim in changing.items() if marked else ():
                torch._dynamo.mark_dynamic(qkv[tensor], dim)
            assert_right(function(*qkv), qkv)
    assert (report.counts["graphs"], report.counts["recompiles"]) == (1, 0)
    report.assert_all_lowered()
    distinct = len(set(shapes))
    assert (cache_info().builds, cache_info().size) == (distinct, distinct)
    assert not any(isinstance(found, Reason) for found in backend.asked)


def test_with_a_block_mask_as_an_argument():
    function = compiled(lambda q, k, v, mask: flex_attention(q, k, v, soft_cap, mask), dynamic=True, lower="always")
    with collect() as report:
        for length in (512, 768, 896, 1024):
            qkv = draw(length)
            mask = create_block_mask(causal, None, None, length, length, device="cpu")
            assert_right(function(*qkv, mask), qkv, causal)
    report.assert_all_lowered()
    assert (report.counts["graphs"], report.counts["recompiles"]) == (1, 0)
    assert cache_info().builds == 4


def test_a_loop_over_lengths_stays_within_the_bound(monkeypatch):
    """200 lengths, and those of a second round that are still there are found."""
    monkeypatch.setenv("CUDNN_FLEX_PLAN_CACHE_SIZE", "64")
    function = compiled(capped, dynamic=True)
    with collect() as report:
        for length in [*range(8, 208), *range(207, 187, -1)]:
            function(*draw(length, batch=1))
            assert cache_info().size <= 64
    report.assert_no_recompiles()
    assert (cache_info().builds, cache_info().evictions, cache_info().size) == (200, 200 - 64, 64)


def test_a_new_shape_of_a_known_kind_is_certified_on_less(backend):
    """The first of each kind in full: odd lengths and multiples of 128 are of two; those that a process forgot anew."""
    function = compiled(capped, dynamic=True)
    for length in (256, 384, 257, 301, 511):
        function(*draw(length))
    full, less = len(REGIMES), len(OF_SHAPES)
    # 256 was compared with the user's functions when it was compiled, all others with the program
    assert backend.regimes == [full, full, full, less, less]
    assert less < full
    for length in (385, 449):
        function(*draw(length))
    assert backend.regimes[5:] == [less, less]


def test_always_means_in_full(backend):
    backend.policy = Policy(certify="always").text
    function = compiled(capped, dynamic=True, certify="always")
    for length in (257, 301, 303):
        function(*draw(length))
    assert backend.regimes == [len(REGIMES)] * 3


def test_a_shape_without_a_right_plan_recompiles_nothing(backend):
    """The call runs on Inductor's kernel there (kernels/cuda.py), and on cuDNN at other shapes as before."""
    function = compiled(capped, dynamic=True)
    with collect() as report:
        function(*draw(256))
        backend.wrong |= {"chained", "dense"}
        function(*draw(300))
        backend.wrong.clear()
        for length in (256, 300, 320):
            function(*draw(length))
    report.assert_no_recompiles()
    refused = [isinstance(found, Reason) for found in backend.asked]
    assert refused == [False, True, False, True, False]
