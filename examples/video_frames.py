"""A causal video transformer: tokens see all of their own chunk of frames, and all chunks before it.

$ python examples/video_frames.py

As in autoregressive video diffusion, a table says for each token where its chunk ends, and one BlockMask serves all
steps. With --window N a chunk sees only the N chunks before it. Prints what is lowered, and compares with eager
flex_attention; on a GPU it measures a training step beside Inductor's.
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
CHUNKS, FRAMES, TOKENS, HEADS, HEAD_DIM = (7, 3, 1560, 12, 128) if ON_GPU else (4, 2, 24, 2, 32)
LENGTH, WIDTH = CHUNKS * FRAMES * TOKENS, HEADS * HEAD_DIM
OPTIONS = {} if ON_GPU else {"inner_backend": "aot_eager"}  # on the CPU: no C++ compiler needed
WARM_UP, STEPS = 3, 10


def frames_mask(window: int) -> BlockMask:
    """window: how many chunks before its own a token sees; 0 for all."""
    size = FRAMES * TOKENS
    chunk = torch.arange(LENGTH, device=DEVICE) // size
    ends, begins = (chunk + 1) * size, (chunk - window).clamp(min=0) * size

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        before = kv < ends[q]
        return before & (kv >= begins[q]) if window else before

    return create_block_mask(visible, None, None, LENGTH, LENGTH, device=DEVICE)


class Block(nn.Module):
    """Modulation by the time step of each frame's noise, attention, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.modulation = nn.Parameter(torch.randn(1, 4, WIDTH) / WIDTH**0.5)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU("tanh"), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, noise: Tensor, mask: BlockMask) -> Tensor:
        """x: [B, LENGTH, C]; noise: [B, frames, C], of each frame."""
        parts = (self.modulation + noise.unsqueeze(2)).repeat_interleave(TOKENS, dim=1).unbind(2)
        q, k, v = self.qkv(self.norm(x) * (1 + parts[0])).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        attended = flex_attention(self.q_norm(q), self.k_norm(k), v, block_mask=mask)
        x = x + parts[1] * self.out(attended.transpose(1, 2).flatten(2))
        return x + parts[3] * self.mlp(self.mlp_norm(x) * (1 + parts[2]))


class VideoTransformer(nn.Module):
    """The blocks alone: no patches, no embedding of time, no text."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor, noise: Tensor, mask: BlockMask) -> Tensor:
        for block in self.blocks:
            x = block(x, noise, mask)
        return x


def compare(model: nn.Module, inputs: tuple[Tensor, Tensor, BlockMask]) -> None:
    compiled = torch.compile(model, backend="cudnn_flex", options=OPTIONS)
    with torch.no_grad():
        print(cudnn_flex_compile.explain(model, *inputs, options=OPTIONS), end="\n\n")
        expected = model(*inputs)
        difference = (compiled(*inputs) - expected).abs().max().item()
    print(f"max |difference| from eager flex_attention {difference:.4f}, outputs up to {expected.abs().max():.2f}")


def train(model: nn.Module, inputs: tuple[Tensor, Tensor, BlockMask], backend: str) -> float:
    """Milliseconds of a forward and a backward."""
    torch.compiler.reset()
    compiled, times = torch.compile(model, backend=backend), []
    for _ in range(WARM_UP + STEPS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        compiled(*inputs).float().square().mean().backward()
        model.zero_grad()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--window", type=int, default=0, help="chunks before its own that a token sees (all)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")  # it is what we compare with
    torch.manual_seed(0)
    model = VideoTransformer().to(DEVICE, torch.bfloat16)
    x = torch.randn(1, LENGTH, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    noise = torch.randn(1, CHUNKS * FRAMES, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    inputs = (x, noise, frames_mask(args.window))
    if not ON_GPU:
        return compare(model, inputs)
    with cudnn_flex_compile.collect() as report:
        stock, ours = (train(model, inputs, backend) for backend in ("inductor", "cudnn_flex"))
    print(report)
    print(f"a training step: {stock:.2f} ms by Inductor, {ours:.2f} ms by cudnn_flex, {stock / ours:.2f}x")


if __name__ == "__main__":
    main()
