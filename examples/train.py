"""Trains a small GPT on the source of Python's standard library; its layers take four kinds of attention in turn.

$ python examples/train.py --backend cudnn_flex  (or inductor)
"""

import argparse
import csv
import statistics
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import cudnn_flex_compile

WINDOW, CAP, BYTES, WARM_UP = 256, 20.0, 256, 10


def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q >= kv


def sliding_window(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return (q >= kv) & (q - kv <= WINDOW)


def soft_cap(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return CAP * torch.tanh(score / CAP)


def slopes(heads: int, device: str) -> Tensor:
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=device) / heads)


def alibi(slopes: Tensor) -> Callable[..., Tensor]:
    return lambda score, b, h, q, kv: score - slopes[h] * (q - kv)


class Block(nn.Module):
    def __init__(self, args: argparse.Namespace, mask: BlockMask, score_mod: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = args.heads, args.kv_heads, args.dim // args.heads
        self.score_mod, self.block_mask = score_mod, mask
        self.norm, self.mlp_norm = nn.RMSNorm(args.dim), nn.RMSNorm(args.dim)
        self.qkv = nn.Linear(args.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(args.dim, args.dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(args.dim, 4 * args.dim), nn.GELU(), nn.Linear(4 * args.dim, args.dim))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, S, D]
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        attended = flex_attention(q, k, v, self.score_mod, self.block_mask, enable_gqa=self.heads > self.kv_heads)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    def __init__(self, args: argparse.Namespace, device: str) -> None:
        super().__init__()
        size = (None, None, args.length, args.length)
        past, window = (create_block_mask(mask, *size, device=device) for mask in (causal, sliding_window))
        kinds = ((past, None), (window, None), (past, soft_cap), (past, alibi(slopes(args.heads, device))))
        self.embedding = nn.Embedding(BYTES, args.dim)
        self.blocks = nn.Sequential(*(Block(args, *kinds[i % len(kinds)]) for i in range(args.layers)))
        self.norm, self.head = nn.RMSNorm(args.dim), nn.Linear(args.dim, BYTES, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.embedding(tokens)))
        with torch.autocast(x.device.type, enabled=False):  # logits in float32: what --matmul-precision is about
            logits = self.head(x.float())
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def batches(args: argparse.Namespace, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and next tokens [batch, length], forever; the same ones for the same seed."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)
    order, span = torch.Generator().manual_seed(args.seed), torch.arange(args.length + 1)
    while True:
        starts = torch.randint(len(text) - args.length, (args.batch, 1), generator=order)
        chunk = text[starts + span].long().to(device)
        yield chunk[:, :-1], chunk[:, 1:]


def train(args: argparse.Namespace, device: str) -> tuple[list[float], list[float]]:
    """Losses, and milliseconds of each step."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision(args.matmul_precision)
    model = GPT(args, device).to(device)
    compiled = torch.compile(model, backend=args.backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    losses: list[Tensor] = []
    clock = [torch.cuda.Event(enable_timing=True) for _ in range(args.steps + 1)]
    for step, (tokens, targets) in zip(range(args.steps), batches(args, device), strict=False):
        clock[step].record()
        with torch.autocast(device, torch.bfloat16):  # queries, keys and values come out in bfloat16
            loss = compiled(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % args.log_every == 0 or step == args.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)
    clock[-1].record()
    torch.cuda.synchronize()
    return torch.stack(losses).tolist(), [start.elapsed_time(end) for start, end in pairwise(clock)]


def parse(doc: str = __doc__ or "", more: Sequence[argparse.ArgumentParser] = ()) -> argparse.Namespace:
    """The arguments of the command line, those of `more` parsers among them."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], parents=more)
    parser.add_argument("--backend", choices=("cudnn_flex", "inductor"), default="cudnn_flex", help="of torch.compile")
    sizes = {"steps": 200, "layers": 8, "dim": 1024, "heads": 8, "length": 4096, "batch": 2, "seed": 0, "log-every": 10}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=" ")
    parser.add_argument("--kv-heads", type=int, help="fewer than --heads for grouped-query attention")
    parser.add_argument("--lr", type=float, default=3e-4, help="of AdamW")
    parser.add_argument("--matmul-precision", choices=("highest", "high", "medium"), default="high", help="in float32")
    parser.add_argument("--csv", type=Path, help="file for the losses")
    args = parser.parse_args()
    args.kv_heads = args.kv_heads or args.heads
    if args.dim % args.heads or args.heads % args.kv_heads:
        parser.error(f"dim {args.dim}, heads {args.heads}, kv-heads {args.kv_heads}: each must divide the one before")
    return args


def main() -> int:
    args = parse()
    if not torch.cuda.is_available():
        print("train.py needs an NVIDIA GPU: flex_attention has no backward on the CPU", file=sys.stderr)
        return 2
    with cudnn_flex_compile.collect() as report:
        losses, times = train(args, "cuda")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows([("step", "loss"), *enumerate(losses)])
    ends, step = f"loss {losses[0]:.4f} -> {losses[-1]:.4f}", statistics.median(times[WARM_UP:] or times)
    print(f"{args.backend}: {ends}, step {step:.2f} ms, {1000 * args.batch * args.length / step:,.0f} tokens/s")
    print(report if report.kept else report.summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
