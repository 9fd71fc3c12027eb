"""inner_backend="torch_tensorrt" with a stand-in for the package: what it is handed, what it takes back, and errors.

The stand-in traces as torch_tensorrt 2.11 does, with its restrictions, and runs the traced graph in place of engines.
"""

import logging
import sys
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch._dynamo.backends import registry
from torch._dynamo.utils import detect_fake_mode
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cudnn_flex_compile import collect
from cudnn_flex_compile.bench.mods import causal, softcap
from cudnn_flex_compile.inner import torch_tensorrt
from cudnn_flex_compile.ops import attention_forward

NAME = torch_tensorrt.NAME
WIDTH, HEADS = 32, 2


class Layer(torch.nn.Module):
    """Projections around attention."""

    def __init__(self, score_mod=None, mask=None):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.score_mod, self.mask = score_mod, mask

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        attended = flex_attention(q, k, v, self.score_mod, self.mask)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Package(ModuleType):
    """Records what it is handed: the graphs, the inputs and the options."""

    def __init__(self):
        super().__init__("torch_tensorrt")
        self.graphs, self.inputs, self.options = [], [], []
        self.fails = None

    def backend(self, graph_module, sample_inputs, **kwargs):
        self.inputs.append(sample_inputs)
        self.options.append(kwargs["options"])
        if self.fails:
            raise self.fails
        fake_mode = detect_fake_mode(sample_inputs)
        with mock.patch.object(fake_mode, "allow_non_fake_inputs", True), fake_mode:
            traced = aot_export_joint_simple(graph_module, sample_inputs, trace_joint=False)
        self.graphs.append(traced.graph)
        return traced


@pytest.fixture
def handovers(monkeypatch):
    """What torch_tensorrt gets, for each graph."""
    found, handover = [], torch_tensorrt._handover

    def watched(*args):
        found.append(handover(*args))
        return found[-1]

    monkeypatch.setattr(torch_tensorrt, "_handover", watched)
    return found


@pytest.fixture
def package(monkeypatch):
    found = Package()
    monkeypatch.setitem(sys.modules, NAME, found)
    monkeypatch.setitem(registry._BACKENDS, NAME, None)
    monkeypatch.setitem(registry._COMPILER_FNS, NAME, found.backend)
    torch._dynamo.reset()
    torch.manual_seed(0)
    return found


def compiled(model, **options):
    return torch.compile(model, backend="cudnn_flex", options={"inner_backend": NAME, **options})


def draw(batch=2, length=48, dtype=torch.bfloat16):
    return torch.randn(batch, length, WIDTH, dtype=dtype)


def mask_of(length=48):
    return create_block_mask(causal, None, None, length, length, device="cpu")


def close(found, expected):
    assert (found.double() - expected.double()).abs().max() <= 2**-6 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_stays_between_what_is_handed_over(package, dtype):
    model = torch.nn.Sequential(Layer(softcap(20.0), mask_of()), Layer(None, mask_of())).to(dtype)
    x = draw(dtype=dtype)
    with torch.no_grad(), collect() as report:
        close(compiled(model)(x), model(x))
    report.assert_all_lowered()
    (graph,) = package.graphs
    targets = [node.target for node in graph.nodes]
    assert targets.count(attention_forward) == 2
    assert targets.count(torch.ops.aten.addmm.default) == 4


def test_options_are_passed_on(package):
    options = {"min_block_size": 7, "torch_executed_ops": {"torch.ops.aten.sin"}}
    with torch.no_grad():
        compiled(Layer().bfloat16(), inner_options=options)(draw())
    assert package.options == [{torch_tensorrt.RAISES: True, **options}]


def test_a_dynamic_batch(package):
    """Sizes are no inputs of what torch_tensorrt gets; one graph serves all batches."""
    model = Layer(softcap(20.0), mask_of()).bfloat16()
    function = compiled(model)
    with torch.no_grad(), collect() as report:
        for batch in (2, 3, 5):
            x = draw(batch)
            torch._dynamo.mark_dynamic(x, 0, min=2, max=16)
            close(function(x), model(x))
    report.assert_no_recompiles()
    assert all(isinstance(value, torch.Tensor) for value in package.inputs[0])


def test_block_masks_are_checked_among_the_inputs_of_dynamo(package):
    """A size among them, which torch_tensorrt does not get, moves nothing."""
    model, mask = Layer(None).bfloat16(), mask_of()

    def call(count, x, blocks):
        attended = flex_attention(*[x.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)] * 3, block_mask=blocks)
        return attended * count.shape[0] + count.sum() + model.out(x).sum()

    function = compiled(call)
    with torch.no_grad():
        for rows in (3, 4):
            count = torch.zeros(rows)
            torch._dynamo.mark_dynamic(count, 0)
            x = draw()
            close(function(count, x, mask), call(count, x, mask))
    (inputs,) = package.inputs
    assert (3,) in [tuple(value.shape) for value in inputs]
    assert not any(isinstance(value, int) for value in inputs)


def test_weights_are_constants(package, handovers):
    model = Layer(softcap(20.0)).bfloat16()
    with torch.no_grad():
        compiled(model)(draw())
    assert {id(weight.tensor()) for weight in handovers[0].weights} == set(map(id, model.parameters()))
    assert not any(isinstance(value, torch.nn.Parameter) for value in package.inputs[0])
    assert len(package.inputs[0]) == 1


@pytest.mark.parametrize("change", ["in place", "another"])
def test_a_weight_that_is_another_now_is_an_error(package, change):
    model, x = Layer(softcap(20.0)).bfloat16(), draw()
    function = compiled(model)
    with torch.no_grad():
        function(x)
        if change == "in place":
            model.out.weight.mul_(2)
        else:
            model.out.weight = torch.nn.Parameter(model.out.weight * 2)
        with pytest.raises(RuntimeError, match=r"weight was changed or replaced .*'immutable_weights': False"):
            function(x)


def test_weights_that_may_change(package):
    model, x = Layer(softcap(20.0)).bfloat16(), draw()
    function = compiled(model, inner_options={"immutable_weights": False})
    with torch.no_grad():
        for _ in range(2):
            close(function(x), model(x))
            model.out.weight.mul_(2)
    assert package.options == [{torch_tensorrt.RAISES: True, "immutable_weights": False}]


def test_weights_without_a_version_stay_inputs(package, handovers):
    """A change of an inference tensor would not be seen."""
    with torch.inference_mode():
        model = Layer(softcap(20.0)).bfloat16()
        compiled(model)(draw())
    assert handovers[0].weights == []


def test_training_is_an_error(package, trainable):
    with pytest.raises(Exception, match=r"is for inference.*torch\.no_grad"):
        compiled(Layer().bfloat16())(draw())
    assert package.graphs == []


def test_parameters_may_require_gradients(package):
    with torch.inference_mode():
        compiled(Layer().bfloat16())(draw())
    assert len(package.graphs) == 1


def test_a_kept_call_takes_its_graph_to_inductor(package, caplog):
    model = Layer(lambda score, b, h, q, kv: torch.special.i0(score * 0.1)).bfloat16()
    x = draw()
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        close(compiled(model)(x), model(x))
    assert package.inputs == []
    assert "a flex_attention call of it is kept" in caplog.text


def test_what_cannot_be_built_goes_to_inductor(package, caplog):
    package.fails = RuntimeError("no engine for the test")
    model, x = Layer(softcap(20.0)).bfloat16(), draw()
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        close(compiled(model)(x), model(x))
    assert "no engine for the test" in caplog.text


def test_what_cannot_be_built_is_an_error_if_asked(package):
    package.fails = RuntimeError("no engine for the test")
    with torch.no_grad(), pytest.raises(Exception, match="no engine for the test"):
        compiled(Layer().bfloat16(), inner_options={"pass_through_build_failures": True})(draw())


def test_a_mode_is_an_error(package):
    with torch.no_grad(), pytest.raises(Exception, match="mode='max-autotune' is an option of inductor"):
        compiled(Layer().bfloat16(), mode="max-autotune")(draw())


class Unusable:
    """An import that fails as torch_tensorrt's does where TensorRT is missing."""

    def find_spec(self, name, path=None, target=None):
        if name == NAME:
            raise Exception("make sure tensorrt lib is in the LD_LIBRARY_PATH")


@pytest.mark.parametrize(
    ("finders", "words"), [([], r"pip install 'cudnn_flex_compile\[tensorrt\]'"), ([Unusable()], "LD_LIBRARY_PATH")]
)
def test_a_missing_package_is_an_error(finders, words, monkeypatch):
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.setattr(sys, "meta_path", [*finders, *sys.meta_path])
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match=words):
        compiled(Layer().bfloat16())(draw())
