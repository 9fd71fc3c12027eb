"""What a process group of two shows, one function a case: on the CPU with gloo, on GPUs with nccl.

    torchrun --nproc-per-node 2 -m tests.distributed.cases --device cuda [case ...]

Numbers: no gradient is further off float64's than twice stock precision's. The first rank prints a line for each case.
"""

import argparse
import contextlib
import datetime
import itertools
import os
import sys
import traceback
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn.attention import flex_attention as stock

from cudnn_flex_compile import install
from cudnn_flex_compile.report.report import collect
from tests.distributed.context_parallel import context_parallel, context_parallel_balanced, context_parallel_installed
from tests.distributed.data_parallel import (
    ddp,
    ddp_adds_no_work,
    ddp_in_one_graph,
    ddp_installed,
    fsdp2,
    fsdp2_as_a_whole,
    fsdp2_installed,
)
from tests.distributed.sharded import alibi_of_all_heads, dtensor_by_local_map, tensor_parallel
from tests.distributed.training import (
    OPTIONS,
    RANKS,
    SIZES,
)
from tests.support.uncompiled import uncompiled

LAYERS = 2  # of the example
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


def example(device):
    """examples/distributed.py: each way of it has the losses of one process."""
    import distributed

    length, dim = SIZES[device]
    sizes = f"--steps 3 --layers {LAYERS} --heads 4 --batch 4 --dim {4 * dim} --length {length}".split()
    losses = {}
    with patch.dict(os.environ, CUDNN_FLEX_INNER_BACKEND="aot_eager", CUDNN_FLEX_LOWER="always"):
        for way in distributed.PARALLEL:
            torch._dynamo.reset()
            with patch.object(sys, "argv", ["distributed.py", "--parallel", way, *sizes]), collect() as report:
                args = distributed.parse()
                losses[way] = distributed.over_ranks(itertools.islice(distributed.steps(args, device), args.steps))
            report.assert_all_lowered()
            assert len(report.lowered) == LAYERS, (way, report.summary)
    for way, found in losses.items():
        assert all(abs(f - e) <= 2e-3 * e for f, e in zip(found, losses["none"], strict=True)), (way, losses)


@patch("context_parallel.LENGTH", 512)  # also on GPUs, for eager flex_attention has all scores in memory
def context_parallel_example(device):
    """examples/context_parallel.py: each way has the losses of a whole sequence in one process."""
    import context_parallel as example

    found, steps = {}, 3
    for way, balance in (("backend", True), ("install", False)):
        torch._dynamo.reset()
        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.object(example, "OPTIONS", OPTIONS))
            stack.enter_context(install(lower="always"))
            report = stack.enter_context(collect())
            found[way] = list(itertools.islice(example.train(way, balance), steps))
        report.assert_all_lowered()
        assert len(report.lowered) == {"backend": example.LAYERS, "install": 1}[way], report.summary
    torch.manual_seed(0)
    whole, given = example.Model().to(device, torch.bfloat16), example.batch()
    optimizer, expected = torch.optim.AdamW(whole.parameters(), lr=1e-3), []
    for _ in range(steps):
        with uncompiled():
            expected.append(whole(*given))
        expected[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    for way, losses in found.items():
        assert all(abs(f - e) <= 2e-3 * e for f, e in zip(losses, expected, strict=True)), (way, losses, expected)


CASES = {case.__name__: case for case in (
    ddp, ddp_in_one_graph, ddp_adds_no_work, fsdp2, fsdp2_as_a_whole, fsdp2_installed, ddp_installed,
    tensor_parallel, dtensor_by_local_map, alibi_of_all_heads, context_parallel, context_parallel_balanced,
    context_parallel_installed, example, context_parallel_example,
)}  # fmt: skip


def verdict(name, device):
    """ "ok", or what went wrong on any rank."""
    torch._dynamo.reset()
    try:
        CASES[name](device)
        mine = ""
    except Exception as error:
        traceback.print_exc()
        mine = f"rank {dist.get_rank()}: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    every = [None] * RANKS
    dist.all_gather_object(every, mine)
    return "; ".join(filter(None, every)) or "ok"


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("cases", nargs="*")
    given = parser.parse_args()
    if given.device == "cpu":
        stock._validate_device = lambda *_: None  # as tests/conftest.py's trainable
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo" if given.device == "cpu" else "nccl", timeout=limit)
    verdicts = []
    for name in given.cases or CASES:
        verdicts.append(verdict(name, given.device))
        if dist.get_rank() == 0:
            print(f"case {name}: {verdicts[-1]}", flush=True)
    dist.destroy_process_group()
    return int(any(v != "ok" for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
