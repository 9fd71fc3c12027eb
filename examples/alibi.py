"""ALiBi in a decoder: a bias by distance, with a slope for each head, in place of position embeddings.

$ python examples/alibi.py

Prints what is lowered, and that a model sees the same tokens at twice the length without new parameters. On a GPU it
compares the speed of forward and backward with Inductor's.
"""

import statistics
import warnings

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import cudnn_flex_compile

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BATCH, LENGTH, HEADS, HEAD_DIM, VOCABULARY = (2, 4096, 16, 128, 8192) if ON_GPU else (2, 160, 4, 32, 256)
OPTIONS = {} if ON_GPU else {"inner_backend": "aot_eager"}  # on the CPU: no C++ compiler needed


def alibi_slopes(heads: int) -> Tensor:
    """[heads] float32: a geometric sequence, as in the paper (Press et al. 2022), for any number of heads."""
    nearest = 1 << (heads.bit_length() - 1)
    slopes = 2.0 ** (-8.0 * torch.arange(1, nearest + 1) / nearest)
    between = 2.0 ** (-4.0 * torch.arange(1, 2 * (heads - nearest) + 1, 2) / nearest)
    return torch.cat([slopes, between])


def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q >= kv


class Decoder(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.register_buffer("slopes", alibi_slopes(HEADS), persistent=False)
        self.embedding, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(layers))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        slopes = self.slopes.float()  # whatever the model's dtype is, the bias is float32

        def alibi(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return score - slopes[h] * (q - kv)

        length = tokens.shape[1]
        block_mask = create_block_mask(causal, None, None, length, length, device=tokens.device)
        x = self.embedding(tokens)
        for norm, qkv, out in zip(self.norms, self.qkv, self.out, strict=True):
            q, k, v = qkv(norm(x)).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
            x = x + out(flex_attention(q, k, v, alibi, block_mask).transpose(1, 2).flatten(2))
        return self.head(x)


def time_training(models: dict[str, nn.Module], tokens: Tensor, rounds: int = 30) -> dict[str, float]:
    """Median milliseconds of forward + backward; the models take turns, so that clocks and heat are the same."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(rounds + 5):
        for name, model in models.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten()).backward()
            end.record()
            end.synchronize()
            if round_ >= 5:  # the first ones compile
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")  # it is what we compare with
    torch.manual_seed(0)
    model = Decoder().to(DEVICE, torch.bfloat16)
    tokens = torch.randint(VOCABULARY, (BATCH, 2 * LENGTH), device=DEVICE)
    compiled = torch.compile(model, backend="cudnn_flex", options=OPTIONS)
    with torch.no_grad():  # flex_attention has no backward on the CPU
        print(cudnn_flex_compile.explain(model, tokens[:, :LENGTH], options=OPTIONS), end="\n\n")
        for length in (LENGTH, 2 * LENGTH):
            logits, expected = (run(tokens[:, :length]) for run in (compiled, model))
            difference = (logits - expected).abs().max().item()
            print(f"length {length}: max |difference| from eager flex_attention {difference:.4f}", end=" ")
            print(f"on logits up to {expected.abs().max().item():.2f}")
    if ON_GPU:
        models = {"cudnn_flex": compiled, "inductor": torch.compile(model, backend="inductor")}
        times = time_training(models, tokens[:, :LENGTH])
        print(f"forward + backward: {times['cudnn_flex']:.2f} ms, inductor {times['inductor']:.2f} ms")


if __name__ == "__main__":
    main()
