"""Real training configurations as data: sizes of layers, masks, and how their projects launch flex_attention.

A new configuration is one row here; layers.py, masks.py and launch.py read it. Experts are one MLP as large as those
that a token meets.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cudnn_flex_compile.bench.rows import masks
from cudnn_flex_compile.bench.rows.masks import Data, MaskMod

TITAN: Any = {  # torchtitan's options for Inductor
    "max_autotune": True, "coordinate_descent_tuning": True, "triton.cudagraphs": False,
    "wrap_inductor_compiled_regions": True,
}  # fmt: skip
UNSLOTH: Any = {"epilogue_fusion": True, "max_autotune": False, "shape_padding": True, "triton.cudagraphs": False}
MAX_AUTOTUNE: Any = {"max_autotune": True, "coordinate_descent_tuning": True}  # mode max-autotune-no-cudagraphs
ALONE, BLOCKS, LAYERS, DISABLED, WHOLE = FORMS = (
    "flex_attention alone", "each block, fullgraph", "layer by layer, dynamic=None",
    "flex_attention behind compiler.disable", "whole model",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One configuration.

    Attributes:
        name: the number of its row, and a letter where a row has several.
        who: the project and the model.
        batch, heads, kv_heads, length: the sizes of the queries; qk_dim, v_dim: the sizes of a head.
        dim, mlp: the widths of a layer.
        form: the way in which it is launched, of FORMS.
        draw, mods: makes the data that its masks read in a step; the masks, which layers take in turns.
        by_batch, by_head: whether its BlockMask differs by batch entry, and has each head.
        options: Inductor's.
        checkpoint: "", "full" or "selective".
        static: whether all steps have the same BlockMask.
        window, every_layer, context, block, encoder: parameters of its masks (masks.py).
        soft_cap, sinks, max_scores, lse: the scores' soft cap, and the outputs that it asks for beside the first.
        lora: the rank of the only weights that are trained, 0 for all.
        before: batch and length of the steps before those that are measured, where they change.
        family: the name of the model in transformers, where the whole of it is compiled.
    """

    name: str
    who: str
    batch: int
    heads: int
    kv_heads: int
    length: int
    qk_dim: int
    dim: int
    mlp: int
    form: str
    draw: Callable[["Row", random.Random], Data]
    mods: Callable[["Row", Data], tuple[MaskMod, ...]]
    v_dim: int = 0
    by_batch: bool = False
    by_head: bool = False
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    checkpoint: str = ""
    static: bool = False
    window: int = 0
    every_layer: bool = False
    context: int = 0
    block: int = 16
    encoder: bool = False
    soft_cap: float = 0.0
    sinks: bool = False
    max_scores: bool = False
    lse: bool = False
    lora: int = 0
    before: tuple[int, int] | None = None
    family: str = ""

    @property
    def kv_length(self) -> int:
        return self.context + self.length

    @property
    def shape(self) -> str:
        """B, H/Hkv, S, D, each with what differs for keys and values."""
        heads = f"{self.heads}/{self.kv_heads}"
        length = str(self.length) if not self.context else f"{self.length}/{self.kv_length}"
        dim = str(self.qk_dim) if not self.v_dim else f"{self.qk_dim}/{self.v_dim}"
        return f"{self.batch}, {heads}, {length}, {dim}"

    @property
    def launch(self) -> str:
        """The way in which it is launched, and the parts that are computed again in the backward."""
        return f"{self.form}; {self.checkpoint} checkpointing" if self.checkpoint else self.form

    def tiny(self) -> "Row":
        """The same row for a CPU, which has no largest scores: two heads or four, short sequences; nothing is tuned."""
        length, heads = (64 if self.context else 256), min(self.heads // self.kv_heads, 2) * 2
        sizes = {"batch": min(self.batch, 2), "heads": heads, "kv_heads": 2, "length": length}
        dims = {"qk_dim": 24 if self.v_dim else 16, "v_dim": 16 if self.v_dim else 0, "dim": 32, "mlp": 64}
        before = (2, 128) if self.before else None
        options = {name: value for name, value in self.options.items() if "tun" not in name}
        masks = {"window": min(self.window, 64), "context": min(self.context, 64), "options": options}
        return dataclasses.replace(self, **sizes, **dims, **masks, before=before, max_scores=False)


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
     "family": "bert"},
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
