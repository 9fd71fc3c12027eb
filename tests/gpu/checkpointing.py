"""Peak memory and time of a training step, with checkpointing off, of whole layers, and by op: both backends.

    python3 -m tests.gpu.checkpointing [--layers 6] [--length 4096] [--batch 2] [--dim 128] [--steps 20]

The peak is what a step takes beyond parameters, inputs and gradients, cuDNN's workspaces included. Steps of both
backends take turns; times are medians. By op, attention is saved, and all else is computed again.
"""

import argparse
import functools
import itertools
import statistics
import sys

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cudnn_flex_compile import collect, ops
from tests import layers
from tests.gpu.unattended import lines

BACKENDS = ("inductor", "cudnn_flex")
SAVED = (ops.attention_forward, torch.ops.higher_order.flex_attention)
MIB = 2**20


def by_op(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


REGION = functools.partial(checkpoint, use_reentrant=False)
WAYS = {
    "off": lambda layer, x: layer(x),
    "layers": REGION,
    "by op": functools.partial(REGION, context_fn=functools.partial(create_selective_checkpoint_contexts, by_op)),
}


class Model(nn.Module):
    """Attention and MLPs in turn, each a region where checkpointing is on."""

    def __init__(self, arguments, device):
        super().__init__()
        width = layers.HEADS * arguments.dim
        kinds = [layers.KINDS[i % len(layers.KINDS)] for i in range(arguments.layers)]
        attention = layers.model(kinds, arguments.length, arguments.dim, device)
        wide = {"device": device, "dtype": torch.bfloat16}
        self.layers = nn.ModuleList(
            nn.Sequential(a, nn.Linear(width, 4 * width, **wide), nn.GELU(), nn.Linear(4 * width, width, **wide))
            for a in attention
        )

    def forward(self, x, way):
        for layer in self.layers:
            x = x + WAYS[way](layer, x)
        return x


def step(function, x, way):
    function(x, way).float().square().mean().backward()


def measured(function, x, way):
    """Milliseconds and MiB of one step."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start, end = torch.cuda.memory_allocated(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step(function, x, way)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), (torch.cuda.max_memory_allocated() - before) / MIB


def compiled(model, x, way):
    """Both backends' functions, after their first steps."""
    torch._dynamo.reset()
    functions = {}
    for backend in BACKENDS:
        functions[backend] = torch.compile(model, backend=backend, fullgraph=True)
        with collect() as report:
            for _ in range(3):
                step(functions[backend], x, way)
        if backend == "cudnn_flex":
            print(f"{way}: {len(report.lowered)} calls lowered, {len(report.kept)} kept", flush=True)
    return functions


def compare(way, model, x, steps):
    functions = compiled(model, x, way)
    samples = {backend: [] for backend in BACKENDS}
    for _, backend in itertools.product(range(steps), BACKENDS):
        samples[backend].append(measured(functions[backend], x, way))
    ms, mib = ([statistics.median(s[i] for s in samples[b]) for b in BACKENDS] for i in range(2))
    times = f"step {ms[0]:.2f} / {ms[1]:.2f} ms, {ms[0] / ms[1]:.2f}x"
    return f"{way}: {times}; peak {mib[0]:.0f} / {mib[1]:.0f} MiB, {mib[1] / mib[0]:.2f} of Inductor's"


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in {"layers": 6, "length": 4096, "batch": 2, "dim": 128, "steps": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("checkpointing: no NVIDIA GPU here; memory and speed are only measured on one")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "cuDNN", torch.backends.cudnn.version())
    model = Model(arguments, "cuda")
    x = layers.inputs(arguments.length, arguments.dim, "cuda", batch=arguments.batch)
    return int(not lines(WAYS, compare, model, x, arguments.steps))


if __name__ == "__main__":
    sys.exit(main())
