"""What is saved and what is computed again: checkpointing, also by op, the partitioner, the direct runner."""

import functools

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cudnn_flex_compile import inner, ops
from cudnn_flex_compile.bench.mods import alibi, causal, softcap
from cudnn_flex_compile.passes.read.call import FLEX_ATTENTION
from cudnn_flex_compile.report.report import collect

pytestmark = [pytest.mark.usefixtures("trainable"), pytest.mark.filterwarnings("ignore")]
OPTIONS = {"direct": {}, "inductor": {}, "aot_eager": {"inner_backend": "aot_eager"}}
LENGTH = 96
CAP = softcap(2.0)


def qkv():
    return [torch.randn(2, LENGTH, 4, 16).bfloat16().transpose(1, 2).requires_grad_() for _ in range(3)]


def alone(q, k, v):
    return flex_attention(q, k, v, CAP)


def among_others(q, k, v):
    return flex_attention(q.sin(), k, v, CAP).cos()


def block_of(runner):
    """The direct runner takes attention alone; the other two compile what is around it."""
    return alone if runner == "direct" else among_others


def compiled(function, runner):
    return torch.compile(function, backend="cudnn_flex", options=OPTIONS[runner])


def gradients(function, args):
    with collect() as report:
        out = function(*args)
    report.assert_all_lowered()
    for t in args:
        t.grad = None
    out.float().sin().sum().backward()  # reentrant checkpointing takes no torch.autograd.grad
    return out, *(t.grad for t in args)


def assert_same(found, expected):
    """Up to the roundings of what is around attention, which may be fused otherwise."""
    for f, e in zip(found, expected, strict=True):
        assert (f - e).norm() <= 1e-2 * e.norm()


@pytest.mark.parametrize("runner", OPTIONS)
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("inside", [True, False], ids=["in the graph", "around the graph"])
def test_a_checkpointed_region_runs_its_forward_twice(runner, reentrant, inside, kernel_calls):
    block, args = block_of(runner), qkv()
    expected = gradients(compiled(block, runner), args)
    assert kernel_calls == {"forward": 1, "backward": 1}
    torch._dynamo.reset()
    kernel_calls.clear()
    again = functools.partial(checkpoint, use_reentrant=reentrant)
    if inside:
        found = gradients(compiled(lambda *t: again(block, *t), runner), args)
    else:
        found = gradients(functools.partial(again, compiled(block, runner)), args)
    assert kernel_calls == {"forward": 2, "backward": 1}
    assert_same(found, expected)


def policy(of_attention, context, op, *args, **kwargs):
    return of_attention if op is torch.ops.cudnn_flex.attention_forward.default else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("runner", OPTIONS)
@pytest.mark.parametrize(
    ("of_attention", "forwards"), [(CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.MUST_RECOMPUTE, 2)],
    ids=["save", "recompute"],
)  # fmt: skip
@pytest.mark.parametrize("inside", [True, False], ids=["in the graph", "around the graph"])
def test_selective_checkpointing_goes_by_the_op(runner, of_attention, forwards, inside, kernel_calls):
    block, args = block_of(runner), qkv()
    contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(policy, of_attention))
    again = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
    if inside:
        found = gradients(compiled(lambda *t: again(block, *t), runner), args)
    else:
        found = gradients(functools.partial(again, compiled(block, runner)), args)
    assert kernel_calls == {"forward": forwards, "backward": 1}
    torch._dynamo.reset()
    assert_same(found, gradients(compiled(block, runner), args))


@pytest.fixture
def partitioned(monkeypatch):
    """Graphs that the min-cut partitioner makes under the inner backend "min_cut": (forwards, backwards)."""
    graphs = [], []

    def kept(into, graph_module, example_inputs):
        into.append(graph_module.graph)
        return graph_module.forward

    compilers = [functools.partial(kept, into) for into in graphs]
    backend = aot_autograd(
        fw_compiler=compilers[0], bw_compiler=compilers[1], partition_fn=min_cut_rematerialization_partition
    )
    monkeypatch.setitem(inner.BACKENDS, "min_cut", lambda graph, inputs, options: backend(graph, inputs))
    return graphs


def count(graph, op):
    return sum(node.target is op for node in graph.nodes)


def layers(q, k, v, checkpointed=()):
    mask = create_block_mask(causal, None, None, LENGTH, LENGTH, device="cpu")
    for i in range(3):
        block = lambda x: flex_attention(x.sin(), k, v, CAP, mask).cos() + x  # noqa: E731
        q = checkpoint(block, q, use_reentrant=False) if i in checkpointed else block(q)
    return q


@pytest.mark.parametrize("checkpointed", [(), (1,), (0, 1, 2)], ids=str)
def test_the_partitioner_computes_attention_again_in_checkpointed_regions_alone(checkpointed, partitioned):
    function = torch.compile(
        functools.partial(layers, checkpointed=checkpointed), backend="cudnn_flex", options={"inner_backend": "min_cut"}
    )
    with collect() as report:
        function(*qkv()).sum().backward()
    report.assert_all_lowered()
    (forward,), (backward,) = partitioned
    assert (count(forward, ops.attention_forward), count(forward, ops.attention_backward)) == (3, 0)
    again = len(checkpointed)
    assert (count(backward, ops.attention_forward), count(backward, ops.attention_backward)) == (again, 3)
    saved = [n.meta["val"] for n in backward.nodes if n.op == "placeholder"]
    stats = [t for t in saved if t.dtype == torch.float32 and t.shape == (2, 4, LENGTH)]
    assert len(stats) == 3 - again


@pytest.mark.parametrize(
    ("saved", "again"),
    [((), 3), ((FLEX_ATTENTION,), 0), ((ops.attention_forward,), 0)],
    ids=["nothing", "the stock op", "ours"],
)
def test_a_policy_that_saves_flex_attention_saves_ours(saved, again, partitioned):
    """As stock's would be: by the op that the user's list names."""

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def model(q, k, v):
        for _ in range(3):
            block = lambda x: flex_attention(x.sin(), k, v, CAP).cos() + x  # noqa: E731
            q = checkpoint(block, q, use_reentrant=False, context_fn=contexts)
        return q

    function = torch.compile(model, backend="cudnn_flex", options={"inner_backend": "min_cut"})
    with collect() as report:
        function(*qkv()).sum().backward()
    report.assert_all_lowered()
    (forward,), (backward,) = partitioned
    assert (count(forward, ops.attention_forward), count(backward, ops.attention_forward)) == (3, again)


def test_the_direct_runner_saves_what_the_backward_reads_and_no_more(monkeypatch):
    from cudnn_flex_compile.inner import direct

    ran = []
    monkeypatch.setattr(direct, "compile", lambda g, real=direct.compile: ran.append(g) or real(g))
    args, saved = qkv(), []
    mod = alibi(4, "cpu")
    function = compiled(lambda *t: flex_attention(*t, mod), "direct")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = function(*args)
    assert len(ran) == 1
    query, key, value, kept_out, stats, slopes = saved
    for tensor, expected in zip((query, key, value, kept_out), (*args, out), strict=True):
        assert tensor.data_ptr() == expected.data_ptr()
    assert (stats.shape, stats.dtype) == ((2, 4, LENGTH), torch.float32)
    assert slopes.numel() == 4


def new_block(runner, cap):
    """A block whose score_mod was not traced before in this process."""
    around = runner != "direct"

    def block(q, k, v):
        out = flex_attention(q.sin() if around else q, k, v, softcap(cap))
        return out.cos() if around else out

    return compiled(block, runner)


@pytest.mark.parametrize("runner", OPTIONS)
def test_the_first_step_may_be_a_checkpointed_one(runner):
    """The pass traces score_mods and their gradients in that step. Nothing of that is a tensor that the step saves."""
    function, args = new_block(runner, 3.0 + list(OPTIONS).index(runner)), qkv()
    found = gradients(functools.partial(checkpoint, function, use_reentrant=False), args)
    expected = torch.autograd.grad(function(*args).float().sin().sum(), args)
    assert_same(found[1:], expected)


@pytest.mark.parametrize("runner", OPTIONS)
def test_hooks_of_saved_tensors_see_those_of_the_step_alone(runner):
    function, args, counts = new_block(runner, 13.0 + list(OPTIONS).index(runner)), qkv(), []

    def pack(tensor):
        counts[-1].append(tensor.shape)
        return tensor

    for _ in range(2):
        counts.append([])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            function(*args).sum().backward()
    assert counts[0] == counts[1]
