"""`Row`: one real training configuration, and the ways in which projects launch flex_attention.

rows.py is the table of them, masks.py has their masks. This file imports nothing of the benchmark.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Data = dict[str, Tensor]
MaskMod = Callable[..., Any]
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
        layers: the number of its layers where that is small; 0 for as many as are asked for.
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
    layers: int = 0

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
        return dataclasses.replace(self, **sizes, **dims, **masks, before=before, max_scores=False, layers=0)
