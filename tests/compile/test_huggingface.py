"""HuggingFace models, unmodified: what is lowered in training, loss and gradients as by stock flex_attention, and no
recompiles.

Knows nothing of Inductor nor of speed (tests/measure/models.py). Dynamo breaks and traces a model before it asks a
backend, so that one trace serves both sides: each graph runs as cudnn_flex compiled it, or as it was.
"""

import collections
import copy
import inspect

import pytest
import torch

from cudnn_flex_compile import collect
from cudnn_flex_compile.backend import cudnn_flex
from cudnn_flex_compile.reasons import Code

integration = pytest.importorskip("transformers.integrations.flex_attention")
modeling = pytest.importorskip("transformers.modeling_utils")

from examples.huggingface import MODELS, make_inputs, make_model  # noqa: E402

LENGTH = 160
ON_CUDA = 'query.device.type != "cpu"'
ALLOWED = 0.02  # of a gradient or a logit, in L2: a few roundings to bfloat16


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch, trainable):
    """There transformers always asks for the log-sum-exp."""
    forward = integration.flex_attention_forward
    source = inspect.getsource(forward)
    assert ON_CUDA in source
    monkeypatch.setattr(integration, "flex_attention_forward", forward)  # put back afterwards
    exec(source.replace(ON_CUDA, "True"), vars(integration))
    monkeypatch.setitem(modeling.ALL_ATTENTION_FUNCTIONS, "flex_attention", integration.flex_attention_forward)


class Both:
    """A backend whose graphs run either as cudnn_flex compiled them, or as they were if `stock` is set."""

    def __init__(self, **options):
        self.stock, self.graphs, self.options = False, 0, {"inner_backend": "eager", **options}

    def __call__(self, graph_module, inputs):
        self.graphs += 1
        as_it_was = copy.deepcopy(graph_module)
        ours = cudnn_flex(graph_module, inputs, options=self.options)
        return lambda *args: (as_it_was if self.stock else ours)(*args)


def step(model, compiled, inputs):
    """Logits, and all gradients in a row."""
    model.zero_grad()
    result = compiled(**inputs)
    result.loss.backward()
    return result.logits.detach().float(), torch.cat([p.grad.flatten().float() for p in model.parameters()])


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


SLOWER = Code.SLOWER
CASES = {  # what becomes of the calls, and how many times
    ("llama", "none"): {"native": 2},
    ("mistral", "left"): {"chained": 2},
    ("gemma2", "right"): {"chained": 2},
    ("qwen3", "middle"): {"chained": 2},
    ("gpt_oss", "right"): {"chained": 2},
    ("gpt_neox", "full"): {"native": 2},
    ("opt", "left"): {"chained": 2},
    ("bert", "none"): {"native": 2},
    ("bert", "middle"): {"native": 2},  # keys are permuted: a length for each sequence
    ("modernbert", "right"): {"native": 1, "chained": 1},  # a symmetric window and padding: a bias over pairs
    ("vit", "none"): {"native": 2},
    ("t5", "none"): {SLOWER: 6},  # the model makes a learnt bias over pairs; zeros for the cross attention
}

OTHER = {"right": "left", "left": "middle", "middle": "right"}  # the padding of the next step


@pytest.mark.parametrize(("name", "padding"), CASES)
def test_a_step_of_training(name, padding):
    check_a_step(name, padding, CASES[name, padding], Both())


def test_sinks_train_through_the_log_sum_exp():
    check_a_step("gpt_oss", "right", {"chained": 2}, Both(lower="always"))


def check_a_step(name, padding, expected, both):
    model = make_model(name, "tiny", "cpu").train()
    compiled = torch.compile(model, backend=both)
    batch, other = min(MODELS[name].batch, 2), OTHER.get(padding, padding)
    first, second = (make_inputs(model, kind, batch, LENGTH, seed) for seed, kind in enumerate((padding, other)))
    with collect() as report:
        found = step(model, compiled, first)
    outcomes = collections.Counter(c.strategies[0] if c.reason is None else c.reason.code for c in report.calls)
    assert outcomes == expected, report
    graphs = both.graphs
    assert_close(found, model, compiled, first, both)
    assert_close(step(model, compiled, second), model, compiled, second, both)
    assert both.graphs == graphs, "another padding took another graph"


def assert_close(found, model, compiled, inputs, both):
    both.stock = True
    for ours, theirs in zip(found, step(model, compiled, inputs), strict=True):
        assert error(ours, theirs) < ALLOWED
    both.stock = False


def test_inference_with_sinks_is_lowered():
    model = make_model("gpt_oss", "tiny", "cpu")
    with collect() as report, torch.no_grad():
        torch.compile(model, backend=Both())(**make_inputs(model, "none", 2, LENGTH))
    report.assert_all_lowered()
