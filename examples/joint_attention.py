"""A block of a diffusion transformer with joint attention: text and image tokens attend to each other in one call.

$ python examples/joint_attention.py

As in Stable Diffusion 3 and FLUX each stream has its own projections and modulation by the time step, and attention
runs over both, one behind the other. Prompts have lengths of their own: padded text tokens are hidden from all others.
Prints what is lowered, and compares with eager flex_attention for two sets of prompts.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import cudnn_flex_compile

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BATCH, TEXT, IMAGE, HEADS, HEAD_DIM = (2, 512, 4096, 16, 64) if ON_GPU else (2, 40, 120, 2, 32)
WIDTH = HEADS * HEAD_DIM
OPTIONS = {} if ON_GPU else {"inner_backend": "aot_eager"}  # on the CPU: no C++ compiler needed


def joint_mask(text_lengths: Tensor) -> BlockMask:
    """Text first, then the image; text_lengths: [batch] integers, at most TEXT."""

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv < text_lengths[b]) | (kv >= TEXT)

    return create_block_mask(visible, len(text_lengths), None, TEXT + IMAGE, TEXT + IMAGE, device=DEVICE)


class Stream(nn.Module):
    """What text and image tokens have each for themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.norm, self.mlp_norm = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU("tanh"), nn.Linear(4 * WIDTH, WIDTH))

    def project(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, S, D]."""
        heads = self.qkv(self.norm(x) * (1 + scale) + shift).unflatten(-1, (3, HEADS, HEAD_DIM))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v

    def finish(self, x: Tensor, attended: Tensor, gate: Tensor, mlp: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        shift, scale, mlp_gate = mlp
        x = x + gate * self.out(attended.transpose(1, 2).flatten(2))
        return x + mlp_gate * self.mlp(self.mlp_norm(x) * (1 + scale) + shift)


class JointBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = Stream(), Stream()

    def forward(self, text: Tensor, image: Tensor, time: Tensor, block_mask: BlockMask) -> tuple[Tensor, Tensor]:
        """text [B, TEXT, C], image [B, IMAGE, C], time [B, C]."""
        text_parts, image_parts = (s.modulation(time).unsqueeze(1).chunk(6, -1) for s in (self.text, self.image))
        projected = self.text.project(text, *text_parts[:2]), self.image.project(image, *image_parts[:2])
        q, k, v = (torch.cat(both, dim=2) for both in zip(*projected, strict=True))
        attended = flex_attention(q, k, v, block_mask=block_mask)
        of_text, of_image = attended.split((text.shape[1], image.shape[1]), dim=2)
        text = self.text.finish(text, of_text, text_parts[2], text_parts[3:])
        return text, self.image.finish(image, of_image, image_parts[2], image_parts[3:])


class DiffusionTransformer(nn.Module):
    """The blocks alone: no patches, no embedding of time, no noise schedule."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(JointBlock() for _ in range(layers))

    def forward(self, text: Tensor, image: Tensor, time: Tensor, block_mask: BlockMask) -> Tensor:
        for block in self.blocks:
            text, image = block(text, image, time, block_mask)
        return image


def main() -> None:
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")  # it is what we compare with
    torch.manual_seed(0)
    model = DiffusionTransformer().to(DEVICE, torch.bfloat16)
    text, image = (torch.randn(BATCH, n, WIDTH, device=DEVICE, dtype=torch.bfloat16) for n in (TEXT, IMAGE))
    time = torch.randn(BATCH, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    block_mask = joint_mask(torch.tensor([TEXT // 3, TEXT - 5], device=DEVICE))
    with torch.no_grad():  # flex_attention has no backward on the CPU
        print(cudnn_flex_compile.explain(model, text, image, time, block_mask, options=OPTIONS), end="\n\n")
        compiled = torch.compile(model, backend="cudnn_flex", options=OPTIONS)
        for lengths in ((TEXT // 3, TEXT - 5), (TEXT, 1)):  # other prompts: the same compiled model
            block_mask = joint_mask(torch.tensor(lengths, device=DEVICE))
            expected = model(text, image, time, block_mask)
            difference = (compiled(text, image, time, block_mask) - expected).abs().max().item()
            print(f"prompts of {lengths} tokens: max |difference| from eager flex_attention {difference:.4f}", end=" ")
            print(f"on outputs up to {expected.abs().max().item():.2f}")


if __name__ == "__main__":
    main()
