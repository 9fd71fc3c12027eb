"""A soft-capped GPT in inference: TensorRT engines of everything around attention, which runs on cuDNN.

$ python examples/tensorrt_inside.py --inner torch_tensorrt  (needs a GPU, and the extra `tensorrt`)
$ python examples/tensorrt_inside.py --inner aot_eager

Prints what is lowered, and compares with eager flex_attention; on a GPU it measures a forward beside Inductor's.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import cudnn_flex_compile

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BATCH, LENGTH, WIDTH, HEADS, LAYERS = (4, 1024, 1024, 8, 4) if ON_GPU else (1, 128, 64, 2, 2)
CAP, WARM_UP, STEPS = 20.0, 5, 50


def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q >= kv


def soft_cap(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return CAP * torch.tanh(score / CAP)


class Block(nn.Module):
    def __init__(self, mask: BlockMask) -> None:
        super().__init__()
        self.norm, self.mlp_norm, self.mask = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), mask
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        x = x + self.out(flex_attention(q, k, v, soft_cap, self.mask).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


def forward_time(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Milliseconds."""
    times = []
    for _ in range(WARM_UP + STEPS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function(x)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[WARM_UP:])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    choices = ("torch_tensorrt", "inductor", "aot_eager")
    parser.add_argument("--inner", choices=choices, default="torch_tensorrt", help="what compiles the rest")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")  # it is what we compare with
    torch.manual_seed(0)
    mask = create_block_mask(causal, None, None, LENGTH, LENGTH, device=DEVICE)
    model = nn.Sequential(*(Block(mask) for _ in range(LAYERS))).to(DEVICE, torch.bfloat16).eval()
    x = torch.randn(BATCH, LENGTH, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    compiled = torch.compile(model, backend="cudnn_flex", options={"inner_backend": args.inner})
    with cudnn_flex_compile.collect() as report:
        difference = (compiled(x) - model(x)).abs().max().item()
    print(report.overview, f"max |difference| from eager flex_attention {difference:.4f}", sep="\n\n")
    if ON_GPU:
        ours, stock = forward_time(compiled, x), forward_time(torch.compile(model), x)
        print(f"a forward: {ours:.2f} ms with {args.inner} inside, {stock:.2f} ms by Inductor alone")


if __name__ == "__main__":
    main()
