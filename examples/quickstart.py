"""Four kinds of attention in one small model, none of them written for cuDNN; runs on the CPU and on a GPU.

$ python examples/quickstart.py
"""

import statistics
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import cudnn_flex_compile

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# On a GPU large enough that it does not wait for the host; tests look whether all four calls are lowered at this size.
LARGE, SMALL = (2, 16, 4096, 128), (1, 4, 512, 64)
BATCH, HEADS, LENGTH, HEAD_DIM = LARGE if ON_GPU else SMALL
LAYERS = "causal", "sliding window", "soft cap", "ALiBi"
WINDOW, CAP = 128, 20.0
# On the CPU: no C++ compiler needed. On a GPU the inner backend is Inductor, which compiles the rest of the model.
OPTIONS = {} if ON_GPU else {"inner_backend": "aot_eager"}


def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q >= kv


def sliding_window(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return (q >= kv) & (q - kv <= WINDOW)


def soft_cap(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return CAP * torch.tanh(score / CAP)


def alibi(slopes: Tensor) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return score - slopes[h] * (q - kv)

    return score_mod


class Attention(nn.Module):
    """One layer; all that differs between layers is the score_mod and the block mask."""

    def __init__(self, mask: Callable[..., Tensor], score_mod: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.score_mod = score_mod
        self.block_mask: BlockMask = create_block_mask(mask, None, None, LENGTH, LENGTH, device=DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        attended = flex_attention(q, k, v, score_mod=self.score_mod, block_mask=self.block_mask)
        return x + self.out(attended.transpose(1, 2).flatten(2))


def make_model() -> nn.Module:
    slopes = 2.0 ** (-8.0 * torch.arange(1, HEADS + 1, device=DEVICE) / HEADS)
    layers = (
        Attention(causal),
        Attention(sliding_window),
        Attention(causal, soft_cap),
        Attention(causal, alibi(slopes)),
    )
    return nn.Sequential(*layers).to(DEVICE, torch.bfloat16)


def compare(compiled: nn.Module, model: nn.Module, x: Tensor) -> None:
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")  # it is what we compare with
    with torch.no_grad():
        got, expected = compiled(x), model(x)
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    difference = (got.float() - expected.float()).abs().max().item()
    print(f"max |difference| from eager flex_attention: {difference:.4f}, on outputs up to {expected.abs().max():.2f}")


def time_training(models: dict[str, nn.Module], x: Tensor, rounds: int = 50) -> dict[str, float]:
    """Median milliseconds of forward + backward; the models take turns, so that clocks and heat are the same."""
    gradient = torch.randn_like(x)
    times: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(rounds + 5):
        for name, model in models.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            model(x).backward(gradient)
            end.record()
            end.synchronize()
            if round_ >= 5:  # the first ones compile
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # which torch does without
    torch.manual_seed(0)
    torch.set_grad_enabled(ON_GPU)  # flex_attention has no backward on the CPU
    model = make_model()
    x = torch.randn(BATCH, LENGTH, HEADS * HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)

    compiled = torch.compile(model, backend="cudnn_flex", options=OPTIONS)
    with cudnn_flex_compile.collect() as report:
        compiled(x)
    print(report.overview, end="\n\n")
    compare(compiled, model, x)
    if not ON_GPU:
        print("no GPU here: the lowered programs ran on the CPU kernel, which checks them but is not fast")
        return
    for layer, call in zip(LAYERS, report.calls, strict=False):
        ratio = "" if call.expected is None else f", {call.expected:.2f}x as fast as Inductor's kernel by prediction"
        print(f"{layer}: {'lowered' if call.reason is None else 'kept'}{ratio}")
    times = time_training({"cudnn_flex": compiled, "inductor": torch.compile(model, backend="inductor")}, x)
    ratio = times["inductor"] / times["cudnn_flex"]
    print(f"forward + backward: {times['cudnn_flex']:.2f} ms, inductor {times['inductor']:.2f} ms: {ratio:.2f}x")


if __name__ == "__main__":
    main()
