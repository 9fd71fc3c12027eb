"""Trains examples/train.py's GPT on several GPUs; the batch is split over them (ddp, fsdp2), or heads are (tensor).

$ torchrun --nproc-per-node 2 examples/distributed.py --parallel fsdp2 --backend cudnn_flex
"""

import argparse
import csv
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
import train

import cudnn_flex_compile

Run = Callable[[Tensor, Tensor], Tensor]


def ddp(model: train.GPT, args: argparse.Namespace, device: str) -> Run:
    """Dynamo splits the graph where DDP's buckets end, and gives each part to the backend."""
    return torch.compile(DistributedDataParallel(model), backend=args.backend)


def fsdp2(model: train.GPT, args: argparse.Namespace, device: str) -> Run:
    """Blocks are sharded, and compiled, one by one: what gathers their weights stays outside of the graphs."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in model.blocks:
        block.compile(backend=args.backend)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def tensor(model: train.GPT, args: argparse.Namespace, device: str) -> Run:
    """Each rank has some of the heads: the weights are DTensors; queries, keys and values plain tensors."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh(device, (ranks,))
    plan = {"qkv": ColwiseParallel(), "out": RowwiseParallel()}
    plan |= {"mlp.0": ColwiseParallel(), "mlp.2": RowwiseParallel()}
    for block in model.blocks:
        kinds = block.qkv.weight.data.split([n * block.head_dim for n in (block.heads, *[block.kv_heads] * 2)])
        shards = zip(*(weight.chunk(ranks) for weight in kinds), strict=True)
        block.qkv.weight.data = torch.cat(list(itertools.chain(*shards)))  # a rank's queries, keys and values together
        block.heads, block.kv_heads = block.heads // ranks, block.kv_heads // ranks
        parallelize_module(block, mesh, plan)
    mine = train.slopes(args.heads, device).chunk(ranks)[rank]
    for block in model.blocks[3::4]:  # score_mods get the index of the head among the rank's own
        block.score_mod = train.alibi(mine)
    return torch.compile(model, backend=args.backend)


PARALLEL = {"none": lambda model, args, device: torch.compile(model, backend=args.backend)}
PARALLEL |= {"ddp": ddp, "fsdp2": fsdp2, "tensor": tensor}
SPLITS_BATCH = ("ddp", "fsdp2")


def by_type(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """The fused optimizer takes plain tensors and DTensors in groups of their own."""
    groups = [[p for p in parameters if isinstance(p, DTensor) == sharded] for sharded in (False, True)]
    return [{"params": group} for group in groups if group]


def steps(args: argparse.Namespace, device: str) -> Iterator[Tensor]:
    """Trains, a step each time that one is asked for: the loss of this rank's part of the batch."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision(args.matmul_precision)
    model = train.GPT(args, device).to(device)
    compiled = PARALLEL[args.parallel](model, args, device)
    optimizer = torch.optim.AdamW(by_type(list(model.parameters())), lr=args.lr, fused=True)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mine = slice(rank, None, ranks) if args.parallel in SPLITS_BATCH else slice(None)
    for tokens, targets in train.batches(args, device):
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(tokens[mine], targets[mine])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()


def over_ranks(losses: Iterable[Tensor]) -> list[float]:
    """Of the whole batch."""
    mean = torch.stack(list(losses))
    dist.all_reduce(mean)
    return (mean / dist.get_world_size()).tolist()


def run(args: argparse.Namespace) -> tuple[list[float], float]:
    """The losses, and milliseconds of a step: the median, the first ones left out."""
    clock = [torch.cuda.Event(enable_timing=True) for _ in range(args.steps + 1)]
    losses: list[Tensor] = []
    clock[0].record()
    for loss in itertools.islice(steps(args, "cuda"), args.steps):
        losses.append(loss)
        clock[len(losses)].record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in itertools.pairwise(clock)]
    return over_ranks(losses), statistics.median(times[train.WARM_UP :] or times)


def parse() -> argparse.Namespace:
    more = argparse.ArgumentParser(add_help=False)
    more.add_argument("--parallel", choices=PARALLEL, default="ddp", help=" ")
    args = train.parse(__doc__ or "", [more])
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    split = {"tensor": "kv_heads", **dict.fromkeys(SPLITS_BATCH, "batch")}.get(args.parallel)
    if split and getattr(args, split) % ranks:
        sys.exit(f"--parallel {args.parallel}: {split} {getattr(args, split)} is no multiple of {ranks} ranks")
    return args


def main() -> int:
    args = parse()
    if not torch.cuda.is_available():
        print("distributed.py needs NVIDIA GPUs: flex_attention has no backward on the CPU", file=sys.stderr)
        return 2
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    try:
        with cudnn_flex_compile.collect() as report:
            losses, step = run(args)
        if dist.get_rank() == 0:
            if args.csv:
                with args.csv.open("w", newline="") as file:
                    csv.writer(file).writerows([("step", "loss"), *enumerate(losses)])
            ends = f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, median step {step:.2f} ms"
            print(f"{args.parallel}, {args.backend}: {ends}", report if report.kept else report.summary, sep="\n")
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
