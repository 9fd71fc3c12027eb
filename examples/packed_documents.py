"""Trains a small GPT on packed documents, files of Python's standard library, with a new mask at every step.

Each sequence holds as many files as fit; no token attends to another file's. The masks of a step are made of document
ids alone, so nothing is compiled again, whatever the files.

$ python examples/packed_documents.py --backend cudnn_flex  (or inductor)

On the CPU, where flex_attention has no backward, losses of a tiny form are compared with those by eager flex_attention.
"""

import argparse
import random
import statistics
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import cudnn_flex_compile

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
LAYERS, WIDTH, HEADS, LENGTH, LONGEST = (8, 1024, 8, 8192, 2000) if ON_GPU else (2, 64, 2, 512, 150)
BATCH, PADDING, START, SYMBOLS, WARM_UP = 1, 256, 257, 258, 10


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, mask: BlockMask) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, S, D]
        attended = flex_attention(q, k, v, block_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor, mask: BlockMask) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, mask)
        with torch.autocast(x.device.type, enabled=False):
            logits = self.head(self.norm(x).to(self.head.weight.dtype)).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PADDING)


def mask_of(documents: Tensor) -> BlockMask:
    """Causal, within each document; [B, S] ids."""

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (documents[b, q] == documents[b, kv]) & (q >= kv)

    batch, length = documents.shape
    return make_mask(visible, batch, None, length, length, device=DEVICE)


make_mask = torch.compile(create_block_mask, dynamic=False) if ON_GPU else create_block_mask


def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, next tokens within the same file, and document ids, [batch, length], forever; the same in each run."""
    files = [path.read_bytes() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    order = random.Random(0)
    while True:
        rows = [packed(files, order) for _ in range(BATCH)]
        yield tuple(torch.tensor(part, device=DEVICE) for part in zip(*rows, strict=True))  # pyright: ignore


def packed(files: list[bytes], order: random.Random) -> tuple[list[int], ...]:
    """One sequence of files, each cut to at most LONGEST bytes; the last one ends where the sequence does."""
    tokens, targets, documents = [], [], []
    while len(tokens) < LENGTH:
        text = order.choice(files)[: order.randint(1, LONGEST)]
        room = LENGTH - len(tokens)
        documents += [documents[-1] + 1 if documents else 0] * min(len(text) + 1, room)
        tokens += [START, *text][:room]
        targets += [*text, PADDING][:room]
    return tokens, targets, documents


@torch.no_grad()
def compare() -> None:
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")  # it is what we compare with
    model = GPT().to(torch.bfloat16)
    compiled = torch.compile(model, backend="cudnn_flex", options={"inner_backend": "aot_eager"}, dynamic=False)
    for step, (tokens, targets, documents) in zip(range(2), batches(), strict=False):
        given = tokens, targets, mask_of(documents)
        difference = (compiled(*given) - model(*given)).abs().item()
        print(f"step {step}: max |difference| from eager flex_attention, of the loss: {difference:.4f}")


def train(backend: str, steps: int) -> None:
    model, times, before = GPT().to(DEVICE), [], made()
    compiled = torch.compile(model, backend=backend, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    for step, (tokens, targets, documents) in zip(range(steps), batches(), strict=False):
        if step == WARM_UP:
            before = made()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        mask = mask_of(documents)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = compiled(tokens, targets, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {int(documents.max()) + 1} documents", flush=True)
    median = statistics.median(times[WARM_UP:] or times)
    graphs, plans = (now - then for now, then in zip(made(), before, strict=True))
    print(f"{backend}: median step {median:.2f} ms, {1000 * BATCH * LENGTH / median:,.0f} tokens/s,", end=" ")
    print(f"after the warm-up {graphs} graphs compiled, {plans} plans built")


def made() -> tuple[int, int]:
    """Graphs compiled, and plans built."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"], cudnn_flex_compile.cache_info().builds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", choices=("cudnn_flex", "inductor"), default="cudnn_flex", help="of torch.compile")
    parser.add_argument("--steps", type=int, default=200, help="on a GPU")
    args = parser.parse_args()
    torch.manual_seed(0)
    with cudnn_flex_compile.collect() as report:
        train(args.backend, args.steps) if ON_GPU else compare()
    print(report)


if __name__ == "__main__":
    main()
