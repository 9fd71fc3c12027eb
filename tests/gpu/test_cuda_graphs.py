"""CUDA graphs against float64: reduce-overhead, torch.cuda.graph, make_graphed_callables, in inference and in training.

Between replays masks change, in place or by new tensors, and the result follows. Whatever is captured was prepared
before: while a graph is captured nothing is built, checked, or silently different.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import cache_clear, cache_info
from cudnn_flex_compile.bench.mods import alibi, causal, causal_padding, sliding, softcap
from cudnn_flex_compile.report.report import collect
from tests.gpu.test_behaviour import assert_right, draw, fresh  # noqa: F401
from tests.gpu.test_block_mask import far, padding
from tests.gpu.test_numerics import poison

LENGTH, STEPS, HEADS = 256, 6, 4
ROOT = Path(__file__).parents[2]
TRAINING = pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
BLOCKS = [f"{way}{kind}_{what}" for way in ("", "full_") for kind in ("kv", "q") for what in ("num_blocks", "indices")]


def inputs(training):
    return [draw(length=LENGTH, requires_grad=training) for _ in range(3)]


def mask_of(mask_mod, batch=None):
    return create_block_mask(mask_mod, batch, None, LENGTH, LENGTH, "cuda")


def given(q, k, v, mask):
    """With a BlockMask from outside."""
    return flex_attention(q, k, v, softcap(2.0), mask)


def made(q, k, v, visible):
    """With a BlockMask made in the graph, of a padding mask."""
    mask = create_block_mask(causal_padding(visible), 2, None, LENGTH, LENGTH, "cuda")
    return flex_attention(q, k, v, softcap(2.0), mask)


def compiled(function, **how):
    return torch.compile(function, backend="cudnn_flex", **how)


def run(function, qkv, mask, grad=None):
    """The output, and the gradients if there is a gradient of the output."""
    out = function(*qkv, mask)
    return [out, *(torch.autograd.grad(out, qkv, grad) if grad is not None else ())]


def check(found, qkv, mask_mod, grad, score_mod=None):
    out, *gradients = found
    assert_right(out, qkv, score_mod or softcap(2.0), mask_mod, grad, gradients)


def new_data(tensors):
    for tensor in tensors:
        tensor.detach().copy_(torch.randn_like(tensor))


@contextlib.contextmanager
def nothing_prepared():
    """No plan is built, checked or refused inside."""
    before = cache_info()
    yield
    after = cache_info()
    names = ("builds", "certifications", "restored", "size")
    assert [getattr(after, n) for n in names] == [getattr(before, n) for n in names]


# mode="reduce-overhead"


def steps(function, training, masks):
    """Steps with new data and the masks in turn: (argument, mask_mod). Twice over, so that each is replayed."""
    with collect() as report:
        for argument, mask_mod in [*masks, *masks]:
            torch.compiler.cudagraph_mark_step_begin()
            qkv = inputs(training)
            grad = torch.randn_like(qkv[0]) if training else None
            with torch.set_grad_enabled(training):
                found = [t.clone() for t in run(function, qkv, argument, grad)]
            check(found, qkv, mask_mod, grad)
    # In training Inductor's kernel honours the BlockMask.
    assert not (report.lowered if training else report.kept), report.summary


@TRAINING
@pytest.mark.parametrize("mask_mod", [causal, sliding(50)], ids=["causal", "window"])
def test_reduce_overhead_with_one_block_mask(training, mask_mod):
    function = compiled(given, mode="reduce-overhead")
    steps(function, training, [(mask_of(mask_mod), mask_mod)] * 3)


@TRAINING
def test_reduce_overhead_with_block_masks_as_inputs(training):
    mods = [causal_padding(padding(step)) for step in range(STEPS)]
    function = compiled(given, mode="reduce-overhead")
    steps(function, training, [(mask_of(mod, 2), mod) for mod in mods])


@TRAINING
def test_reduce_overhead_with_block_masks_made_in_the_graph(training):
    visible = [padding(step) for step in range(STEPS)]
    steps(compiled(made, mode="reduce-overhead"), training, [(v, causal_padding(v)) for v in visible])


@TRAINING
def test_reduce_overhead_with_padding_that_changes_in_place(training):
    visible = padding(0).clone()
    function = compiled(made, mode="reduce-overhead")
    for step in range(STEPS):
        visible.copy_(padding(step))
        steps(function, training, [(visible, causal_padding(visible.clone()))])


def test_reduce_overhead_prepares_nothing_once_it_replays():
    function, mask = compiled(given, mode="reduce-overhead"), mask_of(causal)
    steps(function, True, [(mask, causal)] * 2)
    with nothing_prepared():
        steps(function, True, [(mask, causal)] * 2)


@TRAINING
def test_block_masks_that_disagree_are_honoured_under_reduce_overhead(training):
    """Also by replays, and between BlockMasks that agree."""
    function, right = compiled(given, mode="reduce-overhead"), mask_of(causal)
    wrong = mask_of(lambda b, h, q, kv: q - kv > 130)
    wrong.mask_mod = right.mask_mod
    steps(function, training, [(right, causal), (wrong, far), (right, causal), (wrong, far)])


# torch.cuda.graph


def captured(function, qkv, mask, grad):
    """A graph and its outputs, after warm-up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(function, qkv, mask, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with nothing_prepared(), torch.cuda.graph(graph):
        outputs = run(function, qkv, mask, grad)
    return graph, outputs


def replayed(graph, outputs):
    for tensor in outputs:
        tensor.detach().fill_(float("nan"))
    graph.replay()
    return outputs


@TRAINING
@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_manual_capture_with_a_block_mask_as_input(training, inner):
    qkv, mask = inputs(training), mask_of(causal)
    grad = torch.randn_like(qkv[0]) if training else None
    function = compiled(given, options={"inner_backend": inner})
    with torch.set_grad_enabled(training):
        graph, outputs = captured(function, qkv, mask, grad)
    for _ in range(STEPS):
        new_data([*qkv, *([grad] if training else [])])
        check(replayed(graph, outputs), qkv, causal, grad)


@TRAINING
def test_manual_capture_follows_a_block_mask_that_changes_in_place(training):
    """The padding that the mask_mod captured, and the blocks, get new contents."""
    qkv, visible = inputs(training), padding(0).clone()
    mask_mod = causal_padding(visible)
    mask = mask_of(mask_mod, 2)
    grad = torch.randn_like(qkv[0]) if training else None
    with torch.set_grad_enabled(training):
        graph, outputs = captured(compiled(given), qkv, mask, grad)
    for step in range(STEPS):
        visible.copy_(padding(step))
        now = mask_of(mask_mod, 2)
        for name in BLOCKS:
            getattr(mask, name).copy_(getattr(now, name))
        new_data(qkv)
        check(replayed(graph, outputs), qkv, mask_mod, grad)


@TRAINING
def test_manual_capture_follows_padding_whose_block_mask_is_made_in_the_graph(training):
    qkv, visible = inputs(training), padding(0).clone()
    grad = torch.randn_like(qkv[0]) if training else None
    with torch.set_grad_enabled(training):
        graph, outputs = captured(compiled(made), qkv, visible, grad)
    for step in range(STEPS):
        visible.copy_(padding(step))
        new_data(qkv)
        check(replayed(graph, outputs), qkv, causal_padding(visible), grad)


@TRAINING
def test_manual_capture_follows_captured_tensors(training):
    """Slopes and lengths are read at every replay."""
    slopes, qkv = torch.rand(HEADS, device="cuda"), inputs(training)
    grad = torch.randn_like(qkv[0]) if training else None

    def score_mod(score, b, h, q, kv):
        return score - slopes[h] * (q - kv)

    with torch.set_grad_enabled(training):
        function = compiled(lambda q, k, v, _: flex_attention(q, k, v, score_mod))
        graph, outputs = captured(function, qkv, None, grad)
    for _ in range(STEPS):
        new_data([slopes, *qkv])
        check(replayed(graph, outputs), qkv, None, grad, score_mod)


def test_replays_outlive_the_plan_cache():
    """Plans dropped, other plans built, and freed memory overwritten: a graph still has what it captured."""
    qkv, mask = inputs(True), mask_of(causal_padding(padding(2)), 2)
    grad = torch.randn_like(qkv[0])
    graph, outputs = captured(compiled(given), qkv, mask, grad)
    cache_clear()
    torch._dynamo.reset()
    others = [draw(length=320) for _ in range(3)]
    compiled(lambda q, k, v: flex_attention(q, k, v, alibi(HEADS, "cuda")))(*others).sum().backward()
    torch.cuda.empty_cache()
    poison()
    for _ in range(STEPS):
        new_data(qkv)
        check(replayed(graph, outputs), qkv, mask.mask_mod, grad)


def test_graphs_of_two_shapes_take_turns():
    graphs = []
    for length in (192, 320):
        qkv = [draw(length=length) for _ in range(3)]
        grad = torch.randn_like(qkv[0])
        torch._dynamo.reset()
        function = compiled(lambda q, k, v, _: flex_attention(q, k, v, softcap(2.0)))
        graphs.append((*captured(function, qkv, None, grad), qkv, grad))
    for graph, outputs, qkv, grad in graphs * 3:
        new_data(qkv)
        check(replayed(graph, outputs), qkv, None, grad)


# torch.cuda.make_graphed_callables


class Layer(torch.nn.Module):
    """Compiled inside of the module that is graphed, whose own forward is replaced."""

    def __init__(self, mask):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((1,), 2.0, device="cuda", dtype=torch.bfloat16))
        self.attend = compiled(lambda q, k, v, scale: flex_attention(q * scale, k, v, softcap(2.0), mask))

    def forward(self, q, k, v):
        return self.attend(q, k, v, self.scale)


def test_make_graphed_callables():
    layer = Layer(mask_of(causal))
    sample = tuple(inputs(True))
    layer(*sample).sum().backward()
    graphed = torch.cuda.make_graphed_callables(layer, sample)
    with nothing_prepared():
        for _ in range(STEPS):
            qkv = inputs(True)
            grad = torch.randn_like(qkv[0])
            out = graphed(*qkv)
            dq, dk, dv = torch.autograd.grad(out, qkv, grad)
            scaled = [qkv[0].detach() * layer.scale.detach(), *qkv[1:]]
            check([out, dq / layer.scale.detach(), dk, dv], scaled, causal, grad)


# What was not prepared

PREAMBLE = """
import json, torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from cudnn_flex_compile import cache_clear, cache_info, collect
from cudnn_flex_compile.bench.mods import causal, softcap
torch.manual_seed(0)
qkv = [torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
mask = create_block_mask(causal, None, None, 256, 256, "cuda")
call = torch.compile(lambda q, k, v, m: flex_attention(q, k, v, softcap(2.0), m), backend="cudnn_flex")

def capture():
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.no_grad(), torch.cuda.graph(graph):
            call(*qkv, mask)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
"""


def in_a_process(script):
    """What a script prints last, and how it ends: a failed capture may leave CUDA unusable."""
    environment = {**os.environ, "CUDNN_FLEX_CACHE": "0"}
    command = [sys.executable, "-c", PREAMBLE + script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    return done.returncode, done.stdout.strip().splitlines()[-1:], done.stderr


def test_a_plan_that_is_missing_under_capture_is_an_error_that_says_so():
    code, printed, errors = in_a_process("""
with torch.no_grad():
    call(*qkv, mask)
    cache_clear()
    said = capture()
    builds = cache_info().builds
    out = call(*qkv, mask)
print(json.dumps([said, builds, cache_info().builds, bool(out.isfinite().all())]))
""")
    assert code == 0, errors
    said, during, after, finite = json.loads(printed[0])
    assert "Run the model once with these shapes before capturing" in said
    assert (during, after > 0, finite) == (0, True, True)


def test_a_first_call_under_capture_builds_nothing():
    """torch refuses to compile then, or the call is kept."""
    code, printed, errors = in_a_process("""
with collect() as report:
    said = capture()
print(json.dumps([said, cache_info().builds, [c.reason.code.name for c in report.kept], len(report.lowered)]))
""")
    assert code == 0, errors
    said, builds, kept, lowered = json.loads(printed[0])
    assert said or kept == ["CAPTURING"]
    assert (builds, lowered) == (0, 0)


def test_blocks_that_disagree_at_a_replay_stop_the_device():
    """No synchronisation can be captured, so the error is the device's."""
    code, printed, errors = in_a_process("""
with torch.no_grad():
    call(*qkv, mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(*qkv, mask)
    graph.replay()
    torch.cuda.synchronize()
    print("replayed", flush=True)
    mask.kv_num_blocks.zero_()
    mask.full_kv_num_blocks.zero_()
    graph.replay()
    torch.cuda.synchronize()
    print("not noticed", flush=True)
""")
    assert printed == ["replayed"]
    assert code != 0
    assert "assert" in errors.lower()
