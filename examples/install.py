"""A model that compiles flex_attention by itself, as trainers do, and nothing else: install() has it lowered.

$ python examples/install.py --lower always

No line of the model names cudnn_flex. Documents of other lengths come with each step, and so does another BlockMask.
On the CPU outputs are compared with eager flex_attention's; on a GPU the model is trained, with install() and without.
"""

import argparse
import statistics
import warnings

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import cudnn_flex_compile

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
LENGTH, WIDTH, HEADS, KV_HEADS, LAYERS = (8192, 4096, 32, 8, 2) if ON_GPU else (256, 128, 4, 2, 2)
WARM_UP, STEPS = 3, 20


class Block(nn.Module):
    """Attributes: flex: what attends, compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = WIDTH // HEADS
        self.norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * self.head_dim, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.flex = flex_attention

    def forward(self, x: Tensor, mask: BlockMask) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        attended = self.flex(q, k, v, block_mask=mask, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor, mask: BlockMask) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x

    def attend_by(self, flex: object) -> None:
        for block in self.blocks:
            block.flex = flex


def mask_of(step: int) -> BlockMask:
    """Causal, within documents whose lengths the step draws."""
    draws = torch.Generator().manual_seed(step)
    begins = torch.randint(1, LENGTH // 64, (LENGTH // 64,), generator=draws) * 64
    first = torch.zeros(LENGTH, dtype=torch.int64).index_fill_(0, begins, 1)
    documents = first.cumsum(0).to(DEVICE)

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q >= kv) & (documents[q] == documents[kv])

    return make_mask(visible, None, None, LENGTH, LENGTH, device=DEVICE)


make_mask = torch.compile(create_block_mask) if ON_GPU else create_block_mask


def show(model: Model, x: Tensor, lower: str) -> None:
    """What is lowered, and how far outputs are from eager flex_attention's."""
    model.attend_by(torch.compile(flex_attention))
    with torch.no_grad(), cudnn_flex_compile.install(lower=lower), cudnn_flex_compile.collect() as report:
        found = [model(x, mask_of(step)) for step in range(2)]
    print(report, end="\n\n")
    model.attend_by(flex_attention)
    for step, out in enumerate(found):
        with torch.no_grad():
            difference = (out - model(x, mask_of(step))).abs().max().item()
        print(f"step {step}: max |difference| from eager flex_attention {difference:.4f}")


def train(model: Model, x: Tensor) -> float:
    """Milliseconds of a step."""
    torch.compiler.reset()
    model.attend_by(torch.compile(flex_attention))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    times = []
    for step in range(WARM_UP + STEPS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        model(x, mask_of(step)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    choices = ("when_faster", "always")
    parser.add_argument("--lower", choices=choices, default="when_faster", help="which calls go to cuDNN (when_faster)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")  # it is what we compare with
    torch.manual_seed(0)
    model = Model().to(DEVICE, torch.bfloat16)
    x = torch.randn(1, LENGTH, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    if not ON_GPU:
        return show(model, x, args.lower)
    stock = train(model, x)
    with cudnn_flex_compile.install(lower=args.lower), cudnn_flex_compile.collect() as report:
        ours = train(model, x)
    print(report)
    print(f"a training step: {stock:.2f} ms by Inductor, {ours:.2f} ms with install(), {stock / ours:.2f}x")


if __name__ == "__main__":
    main()
