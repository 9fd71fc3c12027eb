"""An unmodified HuggingFace model, randomly initialised, on backend="cudnn_flex"; runs on the CPU and on a GPU.

$ python examples/huggingface.py llama --padding right  (needs transformers)

On the CPU a tiny model shows what is lowered, and compares logits; on a GPU a larger one is trained by either backend.
"""

import argparse
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import cudnn_flex_compile

# What model families name alike; what one does not know, it ignores. [tiny, for the CPU; large]
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 256, "head_dim": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "sliding_window": 48,
        "num_decoder_layers": 2, "pad_token_id": 0,
    },
    "large": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "vocab_size": 16384, "head_dim": 128,
        "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 4096, "sliding_window": 1024,
        "num_decoder_layers": 4, "pad_token_id": 0,
    },
}  # fmt: skip
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}  # flex_attention has none
ONE_LABEL = {"problem_type": "single_label_classification"}  # or the model sets it in its first step, and is recompiled
PADDINGS = ("none", "full", "right", "left", "middle")


@dataclass(frozen=True, slots=True)
class Family:
    """task: the suffix of transformers' AutoModelFor... settings: of every size; large: of the large one alone."""

    task: str = "CausalLM"
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    large: dict[str, Any] = field(default_factory=dict[str, Any])
    batch: int = 2
    length: int = 4096


SMALL_HEADS = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64}  # 16 of them
MODELS = {
    "llama": Family(),
    "mistral": Family(),  # a sliding window
    "gemma2": Family(settings={"attn_logit_softcapping": 50.0}),  # soft cap, and a window in every other layer
    "qwen3": Family(),
    "gpt_oss": Family(  # attention sinks: they need the log-sum-exp, and its gradient
        settings={"num_local_experts": 4, "num_experts_per_tok": 2},
        large={"head_dim": 64, "num_attention_heads": 32, "sliding_window": 128, "intermediate_size": 2048},
    ),
    "gpt_neox": Family(),
    "opt": Family(settings={"dropout": 0.0}, large={"ffn_dim": 8192, "word_embed_proj_dim": 2048}),
    "bert": Family("MaskedLM", NO_DROPOUT, SMALL_HEADS),
    "modernbert": Family("MaskedLM", large=SMALL_HEADS | {"sliding_window": 64}),  # symmetric windows
    "vit": Family("ImageClassification", NO_DROPOUT | ONE_LABEL, SMALL_HEADS, batch=64, length=197),
    "t5": Family(  # a learnt relative bias; transformers 5.17 reads it out of its bounds for more than one sequence
        "Seq2SeqLM", {"dropout_rate": 0.0, "decoder_start_token_id": 0, "use_cache": False}, SMALL_HEADS, 1, 1024
    ),
}


def make_model(name: str, size: str, device: str, attention: str = "flex_attention") -> nn.Module:
    """The same weights each time, for one name, size and device."""
    family = MODELS[name]
    torch.manual_seed(0)
    settings = SIZES[size] | family.settings | (family.large if size == "large" else {})
    config = transformers.AutoConfig.for_model(name, **settings)
    auto = getattr(transformers, f"AutoModelFor{family.task}")
    with torch.device(device):  # a GPU draws weights faster
        return auto.from_config(config, attn_implementation=attention).to(torch.bfloat16)


def make_inputs(model: nn.Module, padding: str, batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """What the model takes, labels included. Padding hides 1/8 of the first sequence, 3/8 of the second and so on; with
    "none" there is no attention_mask, with "full" one that hides nothing."""
    config, parameter, draws = model.config, next(model.parameters()), torch.Generator().manual_seed(seed)
    if hasattr(config, "image_size"):
        pixels = torch.randn(batch, 3, config.image_size, config.image_size, generator=draws)
        labels = torch.randint(config.num_labels, (batch,), generator=draws)
        return {"pixel_values": pixels.to(parameter), "labels": labels.to(parameter.device)}
    tokens = torch.randint(1, config.vocab_size, (batch, length), generator=draws)
    inputs = {"input_ids": tokens, "labels": tokens}
    if padding != "none":
        hidden = torch.tensor([(2 * (i % 2) + 1) * length // 8 for i in range(batch)]).unsqueeze(1)
        start = {"full": length, "left": 0, "middle": length // 4, "right": length - hidden}[padding]
        place = torch.arange(length)
        visible = (place < start) | (place >= start + hidden)
        inputs |= {"attention_mask": visible.long(), "labels": tokens.masked_fill(~visible, -100)}
    return {name: tensor.to(parameter.device) for name, tensor in inputs.items()}


def show(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """What is lowered, and how far the logits are from stock flex_attention's, on the CPU; no C++ compiler needed."""
    with torch.no_grad():  # flex_attention has no backward on the CPU
        options = {"inner_backend": "aot_eager"}
        print(cudnn_flex_compile.explain(model, **inputs, options=options), end="\n\n")
        logits = torch.compile(model, backend="cudnn_flex", options=options)(**inputs).logits.float()
        torch._dynamo.reset()
        expected = torch.compile(model, backend="aot_eager")(**inputs).logits.float()
    print(f"logits: up to {expected.abs().max():.3f}, max |difference| {(logits - expected).abs().max():.4f}")


def train(model: nn.Module, inputs: dict[str, Tensor], backend: str, steps: int) -> None:
    """Prints losses and the median time of a step."""
    torch._dynamo.reset()
    compiled, optimizer = torch.compile(model, backend=backend), torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    losses, times = [], []
    for _ in range(steps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        loss = compiled(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        end.record()
        losses.append(loss.item())
        times.append(start.elapsed_time(end))
    step = torch.tensor(times[steps // 4 :]).median()  # the first ones compile
    print(f"{backend}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, median step {step:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--padding", choices=PADDINGS, default="right", help="which keys an attention_mask hides")
    parser.add_argument("--steps", type=int, default=40, help="of training, on a GPU")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    family = MODELS[args.model]
    if not torch.cuda.is_available():
        model = make_model(args.model, "tiny", "cpu")
        return show(model, make_inputs(model, args.padding, min(family.batch, 2), length=160))
    with cudnn_flex_compile.collect() as report:
        for backend in ("inductor", "cudnn_flex"):
            model = make_model(args.model, "large", "cuda")
            train(model, make_inputs(model, args.padding, family.batch, family.length), backend, args.steps)
    print(report)


if __name__ == "__main__":
    main()
