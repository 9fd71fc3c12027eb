"""What a way to train on several GPUs gives with each backend: losses, and milliseconds of a step.

    torchrun --nproc-per-node 2 -m tests.measure.distributed_steps --out FILE [arguments of examples/distributed.py]

Knows nothing of what is right or fast. Both backends train in one process, `BLOCK` steps in turn, and where the batch
is split, so does the same model on each GPU alone, with as large a batch as a GPU has then. Of a block's time, the
host's is until all is enqueued: where it is nearly all, the GPU waits. The first rank writes FILE, as JSON.
"""

import argparse
import copy
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import cudnn_flex_compile

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import distributed

BACKENDS = ("inductor", "cudnn_flex")
BLOCK, WARM_UP = 10, 2  # steps; blocks that do not count
RECOMPILES = 64  # of one function: by blocks, backends and models


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    given, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    return distributed.parse(), given.out


def contenders(args):
    """By name and backend, the steps of each."""
    alone = copy.copy(args)
    alone.parallel, alone.batch = "none", args.batch // dist.get_world_size()
    wanted = {args.parallel: args} | ({"alone": alone} if args.parallel in distributed.SPLITS_BATCH else {})
    found = {}
    for (name, mine), backend in itertools.product(wanted.items(), BACKENDS):
        mine = copy.copy(mine)
        mine.backend = backend
        found[name, backend] = distributed.steps(mine, "cuda")
    return found


def block(steps, count):
    """The losses of some steps; milliseconds of one, and those that the host takes for one."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    losses = list(itertools.islice(steps, count))
    enqueued = time.perf_counter()
    torch.cuda.synchronize()
    return losses, *(1000 * (end - start) / count for end in (time.perf_counter(), enqueued))


def measured(args):
    """How many plans were looked for after the first steps, when all should be there; what is told of contenders."""
    losses, times, built = {}, {}, 0
    functions = contenders(args)
    for first in range(0, args.steps, BLOCK):
        for which, steps in functions.items():
            some, *taken = block(steps, min(BLOCK, args.steps - first))
            losses.setdefault(which, []).extend(some)
            times.setdefault(which, []).append(taken)
        built = built if first else cudnn_flex_compile.cache_info().misses
    late = cudnn_flex_compile.cache_info().misses - built
    return late, [
        {
            "name": name, "backend": backend, "losses": distributed.over_ranks(losses[name, backend]),
            "step": statistics.median(step for step, _ in samples[WARM_UP:] or samples),
            "host": statistics.median(host for _, host in samples[WARM_UP:] or samples),
        }
        for (name, backend), samples in times.items()
    ]  # fmt: skip


def main():
    args, out = arguments()
    torch._dynamo.config.recompile_limit = RECOMPILES
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    try:
        with cudnn_flex_compile.collect() as report:
            late, found = measured(args)
        if dist.get_rank() == 0:
            kept = sorted({str(call.reason) for call in report.kept})
            out.write_text(json.dumps({"contenders": found, "calls": report.summary, "kept": kept, "late": late}))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
