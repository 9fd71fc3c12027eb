"""Random flex_attention calls by number: user functions, inputs, and how far off their results may be.

Knows nothing of the package under test. Whatever the device, a number gives the same functions and values.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests import dense
from tests.unit.generate_masks import BATCH, FLOATS, INTS, Sources, tensors

HEADS, HEAD_DIM, SCALE = 4, 64, 1 / 8
LENGTHS = (64, 128, 200, 256, 333)
COUNT = 500
NAMES = ("out", "dQ", "dK", "dV")
NUMBERS = {
    "n": (-40, -3, -1, 0, 1, 2, 7, 31, 64, 100, 150), "m": (1, 2, 3, 5, 16, 64, 100),
    "c": (-40.5, -2.5, -0.5, 0.0, 0.25, 1.0, 2.5, 60.5),
}  # fmt: skip
ROUNDOFF = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}

Mod = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Call:
    """One call: sources of the functions (either may be None), shapes and dtype."""

    number: int
    score: str | None
    mask: str | None
    lengths: tuple[int, int]
    kv_heads: int
    dtype: torch.dtype
    as_block_mask: bool

    def functions(self, device: str) -> tuple[Mod | None, Mod | None]:
        """score_mod and mask_mod, which capture their tensors and numbers as globals."""
        captured = tensors(HEADS, max(self.lengths))
        scope: dict[str, Any] = {
            name: t.item() if name in (*INTS, *FLOATS) else t.to(device) for name, t in captured.items()
        }
        scope |= {"torch": torch, "F": torch.nn.functional, "inf": math.inf}
        return _defined("score, b, h, q, kv", self.score, scope), _defined("b, h, q, kv", self.mask, scope)

    def inputs(self, device: str) -> list[torch.Tensor]:
        """query, key, value and the gradient of the output."""
        generator = torch.Generator().manual_seed(self.number)
        q_len, kv_len = self.lengths
        shapes = [(q_len, HEADS), (kv_len, self.kv_heads), (kv_len, self.kv_heads), (q_len, HEADS)]
        drawn = [torch.randn(BATCH, n, h, HEAD_DIM, generator=generator) for n, h in shapes]
        return [t.to(device, self.dtype).transpose(1, 2) for t in drawn]

    def attention(self, device: str) -> Callable[..., torch.Tensor]:
        """The call as a user writes it, of query, key and value; half of the masks are BlockMasks."""
        score_mod, mask_mod = self.functions(device)
        block_mask = None
        if mask_mod is not None and self.as_block_mask:
            block_mask = create_block_mask(mask_mod, BATCH, HEADS, *self.lengths, device=device)
        elif mask_mod is not None:
            score_mod = _both(score_mod, mask_mod)
        gqa = self.kv_heads < HEADS
        return lambda q, k, v: flex_attention(q, k, v, score_mod, block_mask, enable_gqa=gqa)

    def reference(self, qkv: list[torch.Tensor], grad: torch.Tensor, exact: bool) -> tuple[torch.Tensor, ...]:
        """Dense out, lse, dQ, dK, dV. A score of -inf takes part in no gradient, as in stock kernels."""
        score_mod, mask_mod = self.functions(grad.device.type)
        return dense.with_gradients(*qkv, _stopped(score_mod), mask_mod, SCALE, grad, exact)


def _defined(arguments: str, source: str | None, scope: dict[str, Any]) -> Mod | None:
    if source is None:
        return None
    exec(f"def mod({arguments}):\n    return {source}", scope)
    return scope["mod"]


def _both(score_mod: Mod | None, mask_mod: Mod) -> Mod:
    def masked(score, b, h, q, kv):
        modified = score if score_mod is None else score_mod(score, b, h, q, kv)
        return torch.where(mask_mod(b, h, q, kv), modified, -math.inf)

    return masked


def _stopped(score_mod: Mod | None) -> Mod | None:
    if score_mod is None:
        return None

    def stopped(*arguments):
        modified = score_mod(*arguments)
        return torch.where(modified == -math.inf, -math.inf, modified)

    return stopped


def call(number: int) -> Call:
    """The call of this number, below COUNT; nine of ten leave something visible."""
    chance = random.Random(number)
    drawn = _drawn(number, chance)
    while number % 10 and not _sees(drawn):
        drawn = _drawn(number, chance)
    return drawn


def _drawn(number: int, chance: random.Random) -> Call:
    lengths = (chance.choice(LENGTHS), chance.choice(LENGTHS))
    lengths = lengths if chance.random() < 0.4 else lengths[:1] * 2
    sources = Sources(chance.choice, {**NUMBERS, "l": (max(lengths),)})
    kind = chance.choice(("score", "mask", "both", "both"))
    return Call(
        number,
        sources.score(1) if kind != "mask" else None,
        sources.mask(1) if kind != "score" else None,
        lengths,
        chance.choice((HEADS, HEADS // 2)),
        chance.choice((torch.bfloat16, torch.float16)),
        chance.random() < 0.5,
    )


def _sees(call: Call) -> bool:
    """Whether any row sees more than one key."""
    zeros = torch.zeros(BATCH, HEADS, *call.lengths)
    indices = (
        torch.arange(n, dtype=torch.int32).view([-1 if i == d else 1 for i in range(4)])
        for d, n in enumerate(zeros.shape)
    )
    score_mod, mask_mod = call.functions("cpu")
    modified = _both(score_mod, mask_mod or (lambda *_: torch.tensor(True)))(zeros, *indices)
    return bool(((modified != -math.inf).sum(-1) > 1).any())


def floors(
    call: Call, qkv: list[torch.Tensor], grad: torch.Tensor, out: torch.Tensor, d_value: torch.Tensor
) -> tuple[float, ...]:
    """What rounding the output costs out, dQ, dK and dV where stock's own error vanishes, as norms.

    A flash backward subtracts sum(out * grad), with the output as stored. Where a row sees few keys, the rest of its
    gradient cancels, and that rounding is all that is left: P K of it in dQ, P^T Q in dK.
    """
    query, key, _ = qkv
    score_mod, mask_mod = call.functions(grad.device.type)
    step = 2 * ROUNDOFF[call.dtype]
    off = (out * grad.double()).square().sum(-1, keepdim=True).sqrt() * step * SCALE
    spread = dense.with_gradients(query, key, key, _stopped(score_mod), mask_mod, SCALE, off * query.double(), True)
    rest = step / 8
    found = (rest * out.norm(), (off * spread[0]).norm(), spread[4].norm(), rest * d_value.norm())
    return tuple(float(f) + 1e-6 for f in found)


def too_far(call: Call, found: tuple[torch.Tensor, ...], qkv: list[torch.Tensor], grad: torch.Tensor) -> dict[str, str]:
    """By name of result what is wrong: an error over twice that of stock precision, NaNs, rows that see no key.

    `found` is out, dQ, dK and dV, or the first of them.
    """
    (out, lse, *exact), (stock_out, _, *stock) = (call.reference(qkv, grad, exact=e) for e in (True, False))
    blind, unseen = (lse == -math.inf).unsqueeze(-1), (exact[2] == 0).all(-1, keepdim=True)
    hidden = {"out": blind, "dQ": blind, "dK": unseen, "dV": unseen}
    wrong: dict[str, str] = {}
    limits = floors(call, qkv, grad, out, exact[2])
    for name, f, e, s, floor in zip(NAMES, found, (out, *exact), (stock_out, *stock), limits, strict=False):
        if not torch.equal(f.isnan(), e.isnan()):
            wrong[name] = f"{int(f.isnan().sum())} NaNs, expected {int(e.isnan().sum())}"
        elif bool((f * hidden[name]).any()):
            wrong[name] = "not zero in rows that see no key, or at keys that no row sees"
        elif not (error := float((f - e).norm())) <= (allowed := 2 * float((s - e).norm()) + floor):
            wrong[name] = f"off by {error:.2e}, allowed {allowed:.2e}, size {float(e.norm()):.2e}"
    return wrong
