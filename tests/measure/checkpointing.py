"""Peak memory and time of a training step, with checkpointing off, of whole layers, and by op: both backends.

    python3 -m tests.measure.checkpointing [--layers 6] [--length 4096] [--batch 2] [--dim 128] [--steps 12]

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
from tests.measure.keep_going import lines, tried
from tests.measure.measuring_lock import measuring
from tests.support import layers

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


def compiled(model, x, way, backend):
    """A function after its first steps."""
    function = torch.compile(model, backend=backend, fullgraph=True)
    with collect() as report:
        for _ in range(3):
            step(function, x, way)
    if backend == "cudnn_flex":
        print(f"{way}: {len(report.lowered)} calls lowered, {len(report.kept)} kept", flush=True)
    return function


def compare(way, model, x, steps):
    """A row of the table, also where one backend fails."""
    torch._dynamo.reset()
    functions = {backend: tried(compiled, model, x, way, backend) for backend in BACKENDS}
    samples = {backend: [] for backend, function in functions.items() if function is not None}
    for _, backend in itertools.product(range(steps), samples):
        samples[backend].append(measured(functions[backend], x, way))
    medians = {backend: [statistics.median(s[i] for s in of) for i in range(2)] for backend, of in samples.items()}
    told = [f"{ms:8.2f} ms {mib:7.0f} MiB" for ms, mib in medians.values()]
    if len(told) < len(BACKENDS):
        raise RuntimeError(f"no {' or '.join(b for b in BACKENDS if b not in samples)}; the other: {' '.join(told)}")
    (their_ms, their_mib), (our_ms, our_mib) = medians.values()
    return f"{way:8} {' '.join(told)} {their_ms / our_ms:7.2f}x {our_mib / their_mib:6.2f}"


@measuring()
def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in {"layers": 6, "length": 4096, "batch": 2, "dim": 128, "steps": 12}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("checkpointing: no NVIDIA GPU here; memory and speed are only measured on one")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "cuDNN", torch.backends.cudnn.version())
    model = Model(arguments, "cuda")
    x = layers.inputs(arguments.length, arguments.dim, "cuda", batch=arguments.batch)
    well = lines(WAYS, compare, model, x, arguments.steps)
    print("columns: checkpointing; Inductor's step and peak; ours; times as fast; our peak in Inductor's")
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
