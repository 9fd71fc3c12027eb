"""Trains a small GPT on packed documents, files of Python's standard library, with a new mask at every step.

Each sequence holds as many files as fit; no token attends to another file's. The masks of a step are made of document
ids alone, so nothing is compiled again, whatever the files.

$ python examples/packed_documents.py --backend cudnn_flex
$ python examples/packed_documents.py --backend inductor --steps 200 --csv losses.csv
"""

import argparse
import csv
import random
import statistics
import sys
import sysconfig
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import cudnn_flex_compile

PADDING, START, SYMBOLS, WARM_UP = 256, 257, 258, 10


class Block(nn.Module):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = args.heads, args.kv_heads, args.dim // args.heads
        self.norm, self.mlp_norm = nn.RMSNorm(args.dim), nn.RMSNorm(args.dim)
        self.qkv = nn.Linear(args.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(args.dim, args.dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(args.dim, 4 * args.dim), nn.GELU(), nn.Linear(4 * args.dim, args.dim))

    def forward(self, x: Tensor, mask: BlockMask) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, S, D]
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        attended = flex_attention(q, k, v, block_mask=mask, enable_gqa=self.heads > self.kv_heads)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, args.dim)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.layers))
        self.norm, self.head = nn.RMSNorm(args.dim), nn.Linear(args.dim, SYMBOLS, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor, mask: BlockMask) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, mask)
        with torch.autocast(x.device.type, enabled=False):
            logits = self.head(self.norm(x.float()))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PADDING)


def mask_of(documents: Tensor) -> BlockMask:
    """Causal, within each document; [B, S] ids."""

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (documents[b, q] == documents[b, kv]) & (q >= kv)

    batch, length = documents.shape
    return compiled_mask(visible, batch, None, length, length, device=documents.device.type)


compiled_mask = torch.compile(create_block_mask, dynamic=False)


def batches(args: argparse.Namespace, device: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, next tokens within the same file, and document ids, [batch, length], forever; the same for a seed."""
    files = [path.read_bytes() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    order = random.Random(args.seed)
    while True:
        rows = [packed(files, args.length, args.longest, order) for _ in range(args.batch)]
        yield tuple(torch.tensor(part, device=device) for part in zip(*rows, strict=True))  # pyright: ignore


def packed(files: list[bytes], length: int, longest: int, order: random.Random) -> tuple[list[int], ...]:
    """One sequence of files, each cut to at most `longest` bytes; the last one ends where the sequence does."""
    tokens: list[int] = []
    targets: list[int] = []
    documents: list[int] = []
    while len(tokens) < length:
        text = order.choice(files)[: order.randint(1, longest)]
        room = length - len(tokens)
        symbols = [START, *text][:room]
        following = [*text, PADDING][:room]
        documents += [documents[-1] + 1 if documents else 0] * len(symbols)
        tokens += symbols
        targets += following
    return tokens, targets, documents


def train(args: argparse.Namespace, device: str) -> tuple[list[float], list[float], list[int]]:
    """Losses, milliseconds of each step, and how many graphs were compiled and plans built after the warm-up."""
    torch.manual_seed(args.seed)
    model = GPT(args).to(device)
    compiled = torch.compile(model, backend=args.backend, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    losses: list[Tensor] = []
    clock = [torch.cuda.Event(enable_timing=True) for _ in range(args.steps + 1)]
    before = made()
    for step, (tokens, targets, documents) in zip(range(args.steps), batches(args, device), strict=False):
        if step == WARM_UP:
            before = made()
        clock[step].record()
        mask = mask_of(documents)
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(tokens, targets, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % args.log_every == 0 or step == args.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {int(documents.max()) + 1} documents", flush=True)
    clock[-1].record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in pairwise(clock)]
    return torch.stack(losses).tolist(), times, [now - then for now, then in zip(made(), before, strict=True)]


def made() -> tuple[int, int]:
    """Graphs compiled, and plans built."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"], cudnn_flex_compile.cache_info().builds


def parse() -> argparse.Namespace:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--backend", choices=("cudnn_flex", "inductor"), default="cudnn_flex", help="of torch.compile")
    sizes = {"steps": 200, "layers": 8, "dim": 1024, "heads": 8, "kv-heads": 8, "length": 8192, "batch": 1, "seed": 0}
    for name, default in {**sizes, "longest": 2000, "log-every": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=" ")
    parser.add_argument("--lr", type=float, default=3e-4, help="of AdamW")
    parser.add_argument("--csv", type=Path, help="file for the losses")
    args = parser.parse_args()
    if args.dim % args.heads or args.heads % args.kv_heads:
        parser.error(f"dim {args.dim}, heads {args.heads}, kv-heads {args.kv_heads}: each must divide the one before")
    return args


def main() -> int:
    args = parse()
    if not torch.cuda.is_available():
        print("packed_documents.py needs an NVIDIA GPU: flex_attention has no backward on the CPU", file=sys.stderr)
        return 2
    with cudnn_flex_compile.collect() as report:
        losses, times, (graphs, plans) = train(args, "cuda")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows([("step", "loss"), *enumerate(losses)])
    step = statistics.median(times[WARM_UP:] or times)
    print(f"{args.backend}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, median step {step:.2f} ms,", end=" ")
    print(f"{1000 * args.batch * args.length / step:,.0f} tokens/s,", end=" ")
    print(f"after the warm-up {graphs} graphs compiled, {plans} plans built")
    if args.backend == "cudnn_flex":
        print(report if report.kept else report.summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
