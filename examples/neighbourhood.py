"""Neighbourhood attention on images, as NATTEN has it: each pixel attends to the window of pixels around it.

$ python examples/neighbourhood.py --height 32 --width 32 --window 7

Windows stop at the borders, so that every pixel sees as many others. Prints what is lowered, and compares with eager
flex_attention. Where a window hides most blocks of a large image, Inductor skips more than cuDNN: such calls are kept,
unless `--lower always` asks for cuDNN all the same.
"""

import argparse
import warnings

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import cudnn_flex_compile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = {} if DEVICE == "cuda" else {"inner_backend": "aot_eager"}  # on the CPU: no C++ compiler needed


def neighbourhood_mask(height: int, width: int, window: int) -> BlockMask:
    """Of [height * width] pixels, row by row; the window is odd, and no larger than the image."""
    reach = window // 2

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        centre_y = (q // width).clamp(reach, height - 1 - reach)
        centre_x = (q % width).clamp(reach, width - 1 - reach)
        return ((centre_y - kv // width).abs() <= reach) & ((centre_x - kv % width).abs() <= reach)

    return create_block_mask(visible, None, None, height * width, height * width, device=DEVICE)


class NeighbourhoodBlock(nn.Module):
    """A block of a vision transformer over [batch, height, width, channels]."""

    def __init__(self, channels: int, heads: int, block_mask: BlockMask) -> None:
        super().__init__()
        self.heads, self.block_mask = heads, block_mask
        self.norm, self.mlp_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, image: Tensor) -> Tensor:
        pixels = self.norm(image).flatten(1, 2)
        q, k, v = self.qkv(pixels).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = flex_attention(q, k, v, block_mask=self.block_mask)
        image = image + self.out(attended.transpose(1, 2).flatten(2)).view_as(image)
        return image + self.mlp(self.mlp_norm(image))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    large = DEVICE == "cuda"
    sizes = {"height": 64 if large else 16, "width": 64 if large else 20, "window": 13 if large else 5}
    for name, default in (sizes | {"heads": 8 if large else 2, "head-dim": 64 if large else 32}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lower", choices=("when_faster", "always"), default="when_faster", help="of the backend")
    args = parser.parse_args()
    if args.window % 2 == 0 or args.window > min(args.height, args.width):
        parser.error("the window must be odd, and no larger than the image")
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")  # it is what we compare with
    torch.manual_seed(0)
    channels = args.heads * args.head_dim
    block_mask = neighbourhood_mask(args.height, args.width, args.window)
    blocks = nn.Sequential(*(NeighbourhoodBlock(channels, args.heads, block_mask) for _ in range(2)))
    blocks.to(DEVICE, torch.bfloat16)
    image = torch.randn(2, args.height, args.width, channels, device=DEVICE, dtype=torch.bfloat16)
    options = {**OPTIONS, "lower": args.lower}
    with torch.no_grad():  # flex_attention has no backward on the CPU
        print(cudnn_flex_compile.explain(blocks, image, options=options), end="\n\n")
        found, expected = torch.compile(blocks, backend="cudnn_flex", options=options)(image), blocks(image)
    print(f"max |difference| from eager flex_attention: {(found - expected).abs().max().item():.4f}", end=" ")
    print(f"on outputs up to {expected.abs().max().item():.2f}")


if __name__ == "__main__":
    main()
