"""Transformer layers of a row's sizes, with random weights. The function that attends is given, and may be changed.

launch.py compiles them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from cudnn_flex_compile.bench.rows.row import Row

LATENT = 512  # width of DeepSeek's compressed keys and values


class Projection(nn.Linear):
    """A linear map without bias; with a rank, its weights are frozen, and an adapter of that rank is trained."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.rank = rank
        if rank:
            self.weight.requires_grad_(False)
            self.down = nn.Linear(inputs, rank, bias=False)
            self.up = nn.Linear(rank, outputs, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        plain = super().forward(input)
        return plain + self.up(self.down(input)) if self.rank else plain


class Attention(nn.Module):
    """Attributes: flex: flex_attention, or a compiled function of it."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.row, self.flex = row, flex_attention
        self.v_dim = row.v_dim or row.qk_dim
        latent = min(LATENT, row.dim) if row.v_dim else row.dim
        self.compress = Projection(row.dim, latent, 0) if row.v_dim else nn.Identity()
        self.query = Projection(row.dim, row.heads * row.qk_dim, row.lora)
        self.key = Projection(latent, row.kv_heads * row.qk_dim, row.lora)
        self.value = Projection(latent, row.kv_heads * self.v_dim, row.lora)
        self.out = Projection(row.heads * self.v_dim, row.dim, row.lora)
        self.sinks = nn.Parameter(torch.randn(row.heads)) if row.sinks else None
        self.context = nn.Buffer(torch.randn(row.batch, row.context, row.dim)) if row.context else None
        cap = row.soft_cap
        self.score_mod = (lambda s, b, h, q, kv: torch.tanh(s / cap) * cap) if cap else None  # pyright: ignore

    def forward(self, x: Tensor, mask: BlockMask) -> Tensor:
        row = self.row
        seen = x if self.context is None else torch.cat((self.context, x), dim=1)
        latent = self.compress(seen)
        q, k = rotated(_heads(self.query(x), row.heads)), rotated(_heads(self.key(latent), row.kv_heads))
        v = _heads(self.value(latent), row.kv_heads)
        given: dict[str, Any] = {"block_mask": mask, "enable_gqa": row.heads != row.kv_heads}
        given |= {"score_mod": self.score_mod} if self.score_mod else {}
        if row.sinks or row.lse or row.max_scores:
            given["return_aux"] = AuxRequest(lse=row.sinks or row.lse, max_scores=row.max_scores)
            attended, asked = self.flex(q, k, v, **given)
            if self.sinks is not None:
                attended = attended * torch.sigmoid(asked.lse - self.sinks[:, None]).unsqueeze(-1).to(attended)
        else:
            attended = self.flex(q, k, v, **given)
        return self.out(attended.transpose(1, 2).flatten(2))


def _heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions, [B, H, S, D]."""
    half = x.shape[-1] // 2
    rates = 10000 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device).unsqueeze(1) * rates
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class MLP(nn.Module):
    """A gated MLP."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.gate, self.up = (Projection(row.dim, row.mlp, row.lora) for _ in range(2))
        self.down = Projection(row.mlp, row.dim, row.lora)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, row: Row) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(row), MLP(row)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(row.dim), nn.RMSNorm(row.dim)

    def forward(self, x: Tensor, mask: BlockMask) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    """Layers whose masks take turns."""

    def __init__(self, row: Row, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(row) for _ in range(layers))

    def forward(self, x: Tensor, masks: list[BlockMask]) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x, masks[i % len(masks)])
        return x


def of_transformers(row: Row, layers: int) -> nn.Module | None:
    """The row's model from transformers, which makes its masks itself; None where package or model is missing."""
    try:
        import transformers
    except ImportError:
        return None
    if not row.family:
        return None
    sizes = {
        "hidden_size": row.dim, "intermediate_size": row.mlp, "num_hidden_layers": layers, "vocab_size": 128,
        "num_attention_heads": row.heads, "num_key_value_heads": row.kv_heads, "head_dim": row.qk_dim,
        "sliding_window": row.window, "max_position_embeddings": row.length, "pad_token_id": 0, "use_cache": False,
        "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(row.family, **sizes)  # pyright: ignore
    return transformers.AutoModel.from_config(config, attn_implementation="flex_attention")  # pyright: ignore
