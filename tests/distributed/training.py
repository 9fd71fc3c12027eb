"""A model, a batch for each rank, and the comparison of its training with one process's, for all cases."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from cudnn_flex_compile.backend import cudnn_flex
from cudnn_flex_compile.report.report import collect
from tests.support import layers
from tests.support.uncompiled import uncompiled

RANKS = 2
SIZES = {"cpu": (64, 16), "cuda": (256, 64)}  # length, head dim
OPTIONS = {"inner_backend": "aot_eager", "lower": "always"}
LEAST_BUCKET = 2**20  # bytes of DDP's first bucket
SLACK = 1e-3  # of the norm: sums over ranks are rounded


def backend(graphs, graph_module, example_inputs):
    graphs.append(graph_module)
    return cudnn_flex(graph_module, example_inputs, options=OPTIONS)


class Block(nn.Module):
    """Attention and an MLP of more than DDP's smallest bucket each.

    It is no nn.Sequential: torch 2.14 would trace FSDP's hooks of one, too, and break the graph there.
    """

    def __init__(self, attention, width, **made):
        super().__init__()
        inner = LEAST_BUCKET // width
        self.attention, self.out = attention, nn.Linear(inner, width, **made)
        self.hidden = nn.Linear(width, inner, **made)

    def forward(self, x):
        return x + self.out(nn.functional.gelu(self.hidden(self.attention(x))))


class Model(nn.Module):
    def __init__(self, device):
        super().__init__()
        length, dim = SIZES[device]
        width = layers.HEADS * dim
        attentions = layers.model(layers.KINDS, length, dim, device)
        self.layers = nn.ModuleList(Block(each, width, device=device, dtype=torch.bfloat16) for each in attentions)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def model(device):
    torch.manual_seed(0)
    return Model(device)


def batch(device):
    """The whole one, and the rank's own part of it."""
    length, dim = SIZES[device]
    torch.manual_seed(1)
    whole = layers.inputs(length, dim, device, batch=RANKS)
    return whole, whole[dist.get_rank()].unsqueeze(0)


def step(function, *given):
    function(*given).float().square().mean().backward()


def gradients(module):
    found = {name.removeprefix("module."): p.grad for name, p in module.named_parameters()}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def by_one_process(module, x, *rest):
    """Gradients in float64 and in stock precision, by eager flex_attention."""
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        own = copy.deepcopy(module).to(dtype)
        with uncompiled():
            step(own, x.to(dtype), *rest)
        found.append(gradients(own))
    return found


def assert_close(found, exact, stock_precision, what):
    error, allowed = (found - exact).norm(), 2 * (stock_precision - exact).norm() + SLACK * exact.norm()
    assert bool(error <= allowed), f"{what}: off by {error / exact.norm():.2e}, allowed {allowed / exact.norm():.2e}"


def train_alike(function, module, x, expected, calls, gradients=gradients):
    """A step of the compiled module gives the gradients of one process on the whole batch, all calls lowered."""
    with collect() as report:
        step(function, x)
    report.assert_all_lowered()
    assert len(report.lowered) == calls, report.summary
    exact, rounded = expected
    found = gradients(module)
    assert found.keys() == exact.keys()
    for name, gradient in found.items():
        assert_close(gradient, exact[name], rounded[name], name)
