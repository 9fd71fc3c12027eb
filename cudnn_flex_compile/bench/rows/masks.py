"""The masks of real training configurations, rewritten: random data for each step, and the mask_mods that read it.

rows.py names them. Data depends on a seed alone, so that both sides see the same.
"""

import random

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks

from cudnn_flex_compile.bench.rows.row import Data, MaskMod, Row

SHORTEST, LONGEST = 16, 6  # a document has a length / SHORTEST tokens at least, a length / LONGEST at most
PATCHES = 3  # an image of a mixed document has length / (SHORTEST * PATCHES) tokens or more


def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q >= kv


def lengths(total: int, shortest: int, longest: int, draw: random.Random) -> list[int]:
    """Random lengths that fill `total`."""
    found: list[int] = []
    while sum(found) < total:
        found.append(min(draw.randint(shortest, longest), total - sum(found)))
    return found


def _documents(length: int, draw: random.Random) -> list[int]:
    """Documents of 1500 tokens on average where a sequence has 8192 or more."""
    total = min(length, 8192)
    return lengths(length, max(total // SHORTEST, 1), max(total // LONGEST * 2, 2), draw)


def draw_offsets(row: Row, draw: random.Random) -> Data:
    """The offset at which each document begins, and each token's document, int32, as in torchtitan."""
    sizes = torch.tensor(_documents(row.length, draw))
    ends = sizes.cumsum(0)
    ids = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    padded = torch.full(((row.length // 128 + 1) * 128,), row.length)
    padded[: len(sizes)] = ends - sizes
    return {"doc_id": ids.int(), "offsets": padded.int()}


def offsets(row: Row, data: Data) -> tuple[MaskMod, ...]:
    doc_id, begin = data["doc_id"], data["offsets"]

    def packed(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return kv >= begin[doc_id[q]]

    return (and_masks(causal, packed),)


def draw_ends(row: Row, draw: random.Random) -> Data:
    """The end of each token's document, as in torchtitan with several batch entries."""
    rows = [torch.tensor(_documents(row.length, draw)) for _ in range(row.batch)]
    return {"ends": torch.stack([torch.repeat_interleave(sizes.cumsum(0) - 1, sizes) for sizes in rows]).int()}


def ends(row: Row, data: Data) -> tuple[MaskMod, ...]:
    last = data["ends"]

    def packed(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return q <= last[b, kv]

    return (and_masks(causal, packed),)


def offsets_and_window(row: Row, data: Data) -> tuple[MaskMod, ...]:
    (documents,), window = offsets(row, data), row.window

    def recent(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return q - kv < window

    recent_documents = and_masks(documents, recent)
    return (recent_documents,) if row.every_layer else (recent_documents, documents)


def draw_ids(row: Row, draw: random.Random) -> Data:
    """Each token's document: int64 for each batch entry, as torchtune has them."""
    rows = [torch.tensor(_documents(row.length, draw)) for _ in range(row.batch)]
    return {"ids": torch.stack([torch.repeat_interleave(torch.arange(len(sizes)), sizes) for sizes in rows])}


def same_document(row: Row, data: Data) -> tuple[MaskMod, ...]:
    ids = data["ids"]

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q >= kv) & (ids[b, q] == ids[b, kv])

    return (visible,)


def draw_padding(row: Row, draw: random.Random) -> Data:
    """Whether each token is there: the longest sequence has all, the others end at some length."""
    ends = [row.length, *(draw.randint(row.length // 2, row.length) for _ in range(row.batch - 1))]
    if row.batch == 1:
        ends = [draw.randint(7 * row.length // 8, row.length)]
    return {"padding": torch.arange(row.length) < torch.tensor(ends).unsqueeze(1)}


def padded(row: Row, data: Data) -> tuple[MaskMod, ...]:
    padding, window = data["padding"], row.window

    def full(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return padding[b, kv]

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & padding[b, kv]

    def recent(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & (kv > q - window) & padding[b, kv]

    if row.encoder:
        return (full,)
    return (recent, visible) if window else (visible,)


def draw_spans(row: Row, draw: random.Random) -> Data:
    """Documents of text, images that are seen, and images to be denoised, as BAGEL packs them: -1 is no image."""
    document, full, noise = (torch.full((row.length,), -1) for _ in range(3))
    span = start = 0
    for i, size in enumerate(_documents(row.length, draw)):
        document[start : start + size] = i
        for part in lengths(size, max(size // (2 * PATCHES), 1), max(size // PATCHES, 2), draw):
            kind = draw.choice(("text", "seen", "noise"))
            tokens = slice(start, start + part)
            if kind != "text":
                full[tokens] = span
            if kind == "noise":
                noise[tokens] = span
            span, start = span + 1, start + part
    return {"document": document, "full": full, "noise": noise}


def spans(row: Row, data: Data) -> tuple[MaskMod, ...]:
    document, full, noise = data["document"], data["full"], data["noise"]

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        same_span = (full[q] == full[kv]) & (full[q] >= 0)
        foreign_noise = (noise[kv] >= 0) & (noise[q] != noise[kv])
        return ((q >= kv) | same_span) & ~foreign_noise & (document[q] == document[kv])

    return (visible,)


def draw_frames(row: Row, draw: random.Random) -> Data:
    """The end of each token's chunk of frames: seven chunks, the same in each step."""
    chunk = -(-row.length // 7)
    return {"ends": ((torch.arange(row.length) // chunk + 1) * chunk).clamp(max=row.length)}


def frames(row: Row, data: Data) -> tuple[MaskMod, ...]:
    ends = data["ends"]

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv < ends[q]) | (q == kv)

    return (visible,)


def draw_anchors(row: Row, draw: random.Random) -> Data:
    """The length of the context that each block of drafts sees."""
    count = row.length // row.block
    rows = [sorted(draw.randint(1, row.context) for _ in range(count)) for _ in range(row.batch)]
    return {"anchors": torch.tensor(rows)}


def drafts(row: Row, data: Data) -> tuple[MaskMod, ...]:
    anchors, context, block = data["anchors"], row.context, row.block

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        before = (kv < context) & (kv < anchors[b, q // block])
        own = (kv >= context) & ((kv - context) // block == q // block)
        return before | own

    return (visible,)
