"""Real training configurations as data: sizes of layers, masks, and how their projects launch flex_attention.

A new configuration is one row here; layers.py, masks.py and launch.py read it. Experts are one MLP as large as those
that a token meets.
"""

from typing import Any

from cudnn_flex_compile.bench.rows import masks
from cudnn_flex_compile.bench.rows.row import ALONE, BLOCKS, DISABLED, LAYERS, WHOLE, Row

TITAN: Any = {  # torchtitan's options for Inductor
    "max_autotune": True, "coordinate_descent_tuning": True, "triton.cudagraphs": False,
    "wrap_inductor_compiled_regions": True,
}  # fmt: skip
UNSLOTH: Any = {"epilogue_fusion": True, "max_autotune": False, "shape_padding": True, "triton.cudagraphs": False}
MAX_AUTOTUNE: Any = {"max_autotune": True, "coordinate_descent_tuning": True}  # mode max-autotune-no-cudagraphs
LLAMA_8B: Any = {"heads": 32, "kv_heads": 8, "qk_dim": 128, "dim": 4096, "mlp": 14336}
GEMMA_3: Any = {"heads": 8, "kv_heads": 4, "qk_dim": 256, "dim": 2560, "mlp": 10240, "window": 1024}
DEEPSEEK: Any = {"heads": 16, "kv_heads": 16, "qk_dim": 192, "v_dim": 128, "dim": 2048, "mlp": 11264}
DOCUMENTS: Any = {"draw": masks.draw_offsets, "mods": masks.offsets, "options": TITAN, "batch": 1}
WINDOWED: Any = {**DOCUMENTS, "mods": masks.offsets_and_window}
PADDED: Any = {"draw": masks.draw_padding, "mods": masks.padded, "by_batch": True}
UNSLOTH_GEMMA: Any = {**GEMMA_3, **PADDED, "form": LAYERS, "options": UNSLOTH, "checkpoint": "full", "lora": 16}
_ROWS: tuple[dict[str, Any], ...] = (
    {"name": "1a", "who": "torchtitan Llama 3.1 8B", **LLAMA_8B, **DOCUMENTS, "length": 8192, "form": ALONE,
     "checkpoint": "selective"},
    {"name": "1b", "who": "torchtitan Llama 3.1 8B", **LLAMA_8B, **DOCUMENTS, "length": 8192, "form": BLOCKS,
     "checkpoint": "selective"},
    {"name": "1c", "who": "torchtitan Llama 3.1 70B, a rank of TP 8", **DOCUMENTS, "heads": 8, "kv_heads": 1,
     "qk_dim": 128, "dim": 8192, "mlp": 3584, "length": 65536, "form": ALONE, "checkpoint": "selective"},
    {"name": "1d", "who": "torchtitan Llama 3.1 8B, two sequences", **LLAMA_8B, **DOCUMENTS, "draw": masks.draw_ends,
     "mods": masks.ends, "by_batch": True, "batch": 2, "length": 8192, "form": ALONE, "checkpoint": "selective"},
    {"name": "2a", "who": "torchtitan DeepSeek-V3 16B", **DEEPSEEK, **DOCUMENTS, "length": 16384, "form": ALONE},
    {"name": "2b", "who": "torchtitan Kimi, reads the largest scores", **DEEPSEEK, **DOCUMENTS, "length": 16384,
     "form": ALONE, "max_scores": True},
    {"name": "3a", "who": "torchtitan Muse Glimmer 30B", **WINDOWED, "heads": 32, "kv_heads": 2, "qk_dim": 128,
     "dim": 6656, "mlp": 19968, "window": 2048, "every_layer": True, "length": 8192, "form": ALONE,
     "checkpoint": "full"},
    {"name": "3b", "who": "torchtitan gpt-oss 20B", **WINDOWED, "heads": 64, "kv_heads": 8, "qk_dim": 64,
     "dim": 2880, "mlp": 11520, "window": 128, "sinks": True, "length": 8192, "form": ALONE, "checkpoint": "full"},
    {"name": "4a", "who": "Unsloth Gemma 3 4B", **UNSLOTH_GEMMA, "batch": 8, "length": 1024, "before": (2, 4096)},
    {"name": "4b", "who": "Unsloth Gemma 3 4B", **UNSLOTH_GEMMA, "batch": 2, "length": 4096, "before": (8, 1024)},
    {"name": "5", "who": "torchtune Llama 3 8B, packed", **LLAMA_8B, "draw": masks.draw_ids,
     "mods": masks.same_document, "by_batch": True, "batch": 2, "length": 8192, "form": DISABLED,
     "checkpoint": "full"},
    {"name": "6", "who": "BAGEL", "draw": masks.draw_spans, "mods": masks.spans, "by_head": True, "batch": 1,
     "heads": 28, "kv_heads": 4, "qk_dim": 128, "dim": 3584, "mlp": 18944, "length": 32768, "form": ALONE,
     "checkpoint": "full"},
    {"name": "7", "who": "causal video diffusion", "draw": masks.draw_frames, "mods": masks.frames, "static": True,
     "batch": 1, "heads": 12, "kv_heads": 12, "qk_dim": 128, "dim": 1536, "mlp": 8960, "length": 32768,
     "form": ALONE, "options": MAX_AUTOTUNE},
    {"name": "8", "who": "SpecForge DFlash draft model", "draw": masks.draw_anchors, "mods": masks.drafts,
     "by_batch": True, "batch": 4, "heads": 32, "kv_heads": 8, "qk_dim": 128, "dim": 4096, "mlp": 12288,
     "length": 8192, "context": 3072, "form": ALONE},
    {"name": "9a", "who": "HuggingFace Llama 8B", **LLAMA_8B, **PADDED, "batch": 2, "length": 4096, "form": WHOLE,
     "lse": True, "family": "llama"},
    {"name": "9b", "who": "HuggingFace Gemma 2 9B", **PADDED, "batch": 1, "heads": 16, "kv_heads": 8,
     "qk_dim": 256, "dim": 3584, "mlp": 14336, "length": 8192, "window": 4096, "soft_cap": 50.0, "form": WHOLE,
     "lse": True, "family": "gemma2"},
    {"name": "9c", "who": "HuggingFace BERT base", **PADDED, "batch": 32, "heads": 12, "kv_heads": 12,
     "qk_dim": 64, "dim": 768, "mlp": 3072, "length": 512, "encoder": True, "form": WHOLE, "lse": True,
     "family": "bert", "layers": 12},
)  # fmt: skip
ROWS = tuple(Row(**row) for row in _ROWS)


def chosen(names: list[str]) -> list[Row]:
    """The rows of these names, "1b", or numbers, "1", which are all of that number; all rows for no name.

    Raises:
        ValueError: for a name that no row has, with those that there are.
    """
    if not names:
        return list(ROWS)
    known = {row.name for row in ROWS} | {row.name.rstrip("abcd") for row in ROWS}
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ValueError(f"no row is named {', '.join(map(repr, wrong))}; there are {', '.join(r.name for r in ROWS)}")
    return [row for row in ROWS if row.name in names or row.name.rstrip("abcd") in names]
