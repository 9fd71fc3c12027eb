"""What attention takes of the host in a model whose GPU waits for the host: `python3 -m tests.measure.host_share`.

Knows nothing of right numbers. The GPT of examples/train.py, with and without gradients, by either backend, by ours
with launches that are never replayed (engine/launch/replay.py), and by ours with kernels that only give their first
results again: what is left then is what everything but attention takes. Milliseconds of the host until a step is
enqueued, medians, interleaved; then what an attention call takes of it, by either backend, whose difference
is "host" of passes/decide/step_times.json; and what all else takes, of the host for each matrix product and call, and
of the GPU for each TFLOP: "launch" and "product" there.
"""

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cudnn_flex_compile.kernels import cuda
from cudnn_flex_compile.ops import undispatched
from tests.measure.measuring_lock import compiling, measuring
from tests.support.launched import launched as without_replays

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import train

SIZES = {"dim": 1024, "heads": 8, "kv_heads": 8, "layers": 4, "length": 2048, "batch": 2, "seed": 0}
STOCK, OURS = "inductor", "cudnn_flex"
LAUNCHED, REST = "cudnn_flex, without replays", "cudnn_flex, without its calls"
WARM_UP, ROUNDS, STEPS = 6, 9, 10


def without_calls(*real):
    """A context in which each program's forward and backward, once they have run, give what they gave."""
    given = {}

    def once(run, program, *arguments):
        key = run, program
        if key not in given:
            given[key] = run(*arguments)
        return given[key]

    def forward(*arguments):
        return once(real[0], arguments[6], *arguments)

    def backward(*arguments):
        return once(real[1], arguments[10], *arguments)

    @contextlib.contextmanager
    def stubbed():
        without_bound_calls = {"_forwards": {}, "_backwards": {}}
        with (
            mock.patch.multiple(undispatched, **without_bound_calls),
            mock.patch.multiple(cuda, forward=forward, backward=backward),
        ):
            yield

    return stubbed


def steps_of(model, batch, training):
    """By name, what runs one step."""
    options = {STOCK: {}, OURS: {"options": {"lower": "always"}}}
    compiled = {name: torch.compile(model, backend=name, dynamic=False, **options[name]) for name in options}

    def step(name):
        with torch.autocast("cuda", torch.bfloat16), torch.set_grad_enabled(training):
            loss = compiled[name](*batch)
        if training:
            loss.backward()
            model.zero_grad()

    stubbed = without_calls(cuda.forward, cuda.backward)

    def rest():
        with stubbed():
            step(OURS)

    def launched():
        with without_replays():
            step(OURS)

    return {STOCK: lambda: step(STOCK), OURS: lambda: step(OURS), LAUNCHED: launched, REST: rest}


def host(step):
    """Milliseconds of a step, of some in a row, until they are enqueued."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    taken = (time.perf_counter() - start) / STEPS * 1e3
    torch.cuda.synchronize()
    return taken


def measured(steps):
    times = {name: [] for name in steps}
    for _ in range(WARM_UP + ROUNDS):
        for name, step in steps.items():
            times[name].append(host(step))
    return {name: statistics.median(samples[WARM_UP:]) for name, samples in times.items()}


def gpu(step):
    """Milliseconds of a step's kernels."""
    step()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiled.key_averages()) / STEPS / 1e3


def products_of(model, batch):
    """How many matrix products a forward has, and their TFLOP."""
    weights = [module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)]
    return len(weights), 2 * batch[0].numel() * sum(weights) / 1e12


def main():
    args = argparse.Namespace(**SIZES)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    with compiling():
        model, batch = train.GPT(args, "cuda").cuda(), next(train.batches(args, "cuda"))
        steps = {training: steps_of(model, batch, training) for training in (True, False)}
        for step in [step for by_name in steps.values() for step in by_name.values()]:
            step()
    with measuring():
        for training, by_name in steps.items():
            found = measured(by_name)
            print("training" if training else "forward", {name: round(ms, 2) for name, ms in found.items()})
            calls = ((name, (found[name] - found[REST]) / args.layers) for name in (STOCK, OURS, LAUNCHED))
            print("  a call:", ", ".join(f"{name} {ms:.3f} ms" for name, ms in calls), flush=True)
            products, tflop = products_of(model, batch)
            launch, product = found[REST] / (products + args.layers), gpu(by_name[REST]) / tflop
            print(f"  all else: host {launch:.3f} ms a product or call, GPU {product:.2f} ms a TFLOP", flush=True)


if __name__ == "__main__":
    main()
