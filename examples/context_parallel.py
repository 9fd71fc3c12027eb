"""A model whose sequence is split over ranks by torch's context parallel: each has some queries, and gathers all keys.

$ torchrun --nproc-per-node 2 examples/context_parallel.py --balance
$ torchrun --nproc-per-node 2 examples/context_parallel.py --way install  (or inductor)

torch shards tokens and BlockMask; with --balance each rank gets some of the sequence's head and of its tail. Losses are
those of one process (--nproc-per-node 1). On the CPU the loss is compared with that by eager flex_attention.
"""

import argparse
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import _attention as context
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import cudnn_flex_compile

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
LENGTH, HEADS, HEAD_DIM, LAYERS = (65536, 16, 128, 4) if ON_GPU else (512, 2, 16, 2)
WIDTH, SYMBOLS, WARM_UP, STEPS = HEADS * HEAD_DIM, 256, 5, 25
OPTIONS = {} if ON_GPU else {"inner_backend": "aot_eager"}  # on the CPU: no C++ compiler needed


class Attend(nn.Module):
    """A module of its own, for context parallel gathers keys and values before its forward."""

    flex = staticmethod(flex_attention)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        return self.flex(q, k, v, block_mask=mask)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attend = nn.RMSNorm(WIDTH), Attend()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, mask: BlockMask) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return x + self.out(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """The loss of predicting the next token, by attention alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(SYMBOLS, WIDTH), nn.Linear(WIDTH, SYMBOLS, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, tokens: Tensor, targets: Tensor, mask: BlockMask) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return nn.functional.cross_entropy(self.head(x).float().flatten(0, 1), targets.flatten())


def batch() -> tuple[Tensor, Tensor, BlockMask]:
    """Tokens, next tokens, and a causal mask of documents, the same ones on all ranks."""
    text = (torch.arange(LENGTH + 1, device=DEVICE).square() // 7 % SYMBOLS)[None]
    documents = torch.arange(LENGTH, device=DEVICE) // (LENGTH // 3)

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q >= kv) & (documents[q] == documents[kv])

    return text[:, :-1], text[:, 1:], create_block_mask(visible, 1, 1, LENGTH, LENGTH, device=DEVICE)


def prepared(balance: bool) -> tuple[Model, tuple[Tensor, Tensor, BlockMask]]:
    """The model, and this rank's part of the batch."""
    torch.manual_seed(0)
    model, given, ranks = Model().to(DEVICE, torch.bfloat16), batch(), dist.get_world_size()
    mesh = init_device_mesh(DEVICE, (ranks,))
    over_ranks = context._ContextParallel(2, context._ContextParallel.AttentionType.FLEX)
    parallelize_module(model, mesh, {"blocks.*.attend": over_ranks})
    balancer = context._HeadTailLoadBalancer(LENGTH, ranks, DEVICE) if balance else None
    with torch.compiler.set_stance("default" if ON_GPU else "force_eager"):  # torch compiles the making of the mask
        return model, tuple(context._context_parallel_shard(mesh, list(given), [1, 1, 0], balancer))


def compiled(model: Model, way: str) -> nn.Module:
    if way == "backend":
        return torch.compile(model, backend="cudnn_flex", options=OPTIONS)
    for block in model.blocks:
        block.attend.flex = torch.compile(flex_attention)
    return model


def train(way: str, balance: bool) -> Iterator[float]:
    """A step each time that one is asked for: the loss of the whole batch."""
    model, given = prepared(balance)
    run, optimizer = compiled(model, way), torch.optim.AdamW(model.parameters(), lr=1e-3)
    while True:
        loss = run(*given)
        loss.backward()
        means = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        for mean in means:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
        yield means[0].item()


@torch.no_grad()
def compare(way: str, balance: bool) -> str:
    model, given = prepared(balance)
    difference = (model(*given) - compiled(model, way)(*given)).abs().item()
    return f"max |difference| from eager flex_attention, of the loss: {difference:.5f}"


def measure(way: str, balance: bool) -> str:
    done = [(loss, time.perf_counter()) for loss in itertools.islice(train(way, balance), STEPS)]
    step = statistics.median(end - start for (_, start), (_, end) in itertools.pairwise(done[WARM_UP:]))
    return f"{way}: loss {done[0][0]:.4f} -> {done[-1][0]:.4f}, median step {1000 * step:.2f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--way", choices=("backend", "install", "inductor"), default="backend")
    parser.add_argument("--balance", action="store_true", help="equal work for all ranks")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")  # it is what we compare with
    if ON_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if ON_GPU else "gloo")
    if args.way == "install":
        cudnn_flex_compile.install()
    with cudnn_flex_compile.collect() as report:
        line = (measure if ON_GPU else compare)(args.way, args.balance)
    if dist.get_rank() == 0:
        print(report.overview, line, sep="\n\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
