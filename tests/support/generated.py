"""Random flex_attention calls by number: user functions, inputs, and how far off their results may be.

Knows nothing of the package under test. Whatever the device, a number gives the same functions and values. The calls
of this module differ in functions and lengths; those of tests/fuzzing/cases.py in everything.
"""

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.support import dense
from tests.support.generate_masks import BATCH, FLOATS, INTS, Sources, tensors
from tests.support.layouts import GRADIENTS, LAYOUTS

HEADS, HEAD_DIM = 4, 64
LENGTHS = (64, 128, 200, 256, 333)
COUNT = 500
NAMES = ("out", "dQ", "dK", "dV")
LEAST_LIMIT = 8  # captured numbers are fractions of the limit of the axes: none of them may become 0
NUMBERS = {
    "n": (-40, -3, -1, 0, 1, 2, 7, 31, 64, 100, 150), "m": (1, 2, 3, 5, 16, 64, 100),
    "c": (-40.5, -2.5, -0.5, 0.0, 0.25, 1.0, 2.5, 60.5),
}  # fmt: skip
ROUNDOFF = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}

Mod = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        score, mask: sources of the functions; either may be None.
        lengths: of q and kv. dims: of q and k, and of v. heads: of q.
        as_block_mask: whether the mask is a BlockMask, or part of the score_mod.
        layout, grad_layout: names in tests/support/layouts.py.
        training: whether gradients are asked for. lse: whether the log-sum-exp is; then without gradients.
    """

    number: int
    score: str | None
    mask: str | None
    lengths: tuple[int, int]
    kv_heads: int
    dtype: torch.dtype
    as_block_mask: bool
    batch: int = BATCH
    heads: int = HEADS
    dims: tuple[int, int] = (HEAD_DIM, HEAD_DIM)
    layout: str = "BSHD"
    grad_layout: str = "BSHD"
    training: bool = True
    lse: bool = False

    @property
    def limit(self) -> int:
        """No index of q or kv reaches it."""
        return max(*self.lengths, LEAST_LIMIT)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.dims[0])

    def functions(self, device: str) -> tuple[Mod | None, Mod | None]:
        """score_mod and mask_mod, which capture their tensors and numbers as globals."""
        named = {name for source in (self.score, self.mask) if source for name in compile(source, "", "eval").co_names}
        scope: dict[str, Any] = {
            name: t.item() if name in (*INTS, *FLOATS) else t.to(device)
            for name, t in _captured(self.heads, self.limit).items()
            if name in named
        }
        scope |= {"torch": torch, "F": torch.nn.functional, "inf": math.inf}
        return _defined("score, b, h, q, kv", self.score, scope), _defined("b, h, q, kv", self.mask, scope)

    def inputs(self, device: str) -> list[torch.Tensor]:
        """query, key, value and the gradient of the output."""
        generator = torch.Generator().manual_seed(self.number)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, self.dtype)

        (q_len, kv_len), (dim, value_dim) = self.lengths, self.dims
        query, out = (self.batch, self.heads, q_len, dim), (self.batch, self.heads, q_len, value_dim)
        key, value = (self.batch, self.kv_heads, kv_len, dim), (self.batch, self.kv_heads, kv_len, value_dim)
        return [*LAYOUTS[self.layout]([query, key, value], draw), *GRADIENTS[self.grad_layout]([out], draw)]

    def attention(self, device: str) -> Callable[..., Any]:
        """The call as a user writes it, of query, key and value; half of the masks are BlockMasks."""
        score_mod, mask_mod = self.functions(device)
        block_mask = None
        if mask_mod is not None and self.as_block_mask:
            block_mask = create_block_mask(mask_mod, self.batch, self.heads, *self.lengths, device=device)
        elif mask_mod is not None:
            score_mod = _both(score_mod, mask_mod)
        extra = {"enable_gqa": self.kv_heads < self.heads, "return_lse": self.lse}
        return lambda q, k, v: flex_attention(q, k, v, score_mod, block_mask, **extra)

    def reference(self, qkv: list[torch.Tensor], grad: torch.Tensor, exact: bool) -> tuple[torch.Tensor, ...]:
        """Dense out, lse, dQ, dK, dV. A score of -inf takes part in no gradient, as in stock kernels."""
        score_mod, mask_mod = self.functions(grad.device.type)
        return dense.with_gradients(*qkv, _stopped(score_mod), mask_mod, self.scale, grad, exact)


@functools.lru_cache(8)
def _captured(heads: int, limit: int) -> dict[str, torch.Tensor]:
    return tensors(heads, limit)


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
    while number % 10 and not sees(drawn):
        drawn = _drawn(number, chance)
    return drawn


def _drawn(number: int, chance: random.Random) -> Call:
    lengths = (chance.choice(LENGTHS), chance.choice(LENGTHS))
    lengths = lengths if chance.random() < 0.4 else lengths[:1] * 2
    sources = Sources(chance.choice, {**NUMBERS, "l": (max(*lengths, LEAST_LIMIT),)})
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


def sees(call: Call) -> bool:
    """Whether any row sees more than one key."""
    zeros = torch.zeros(call.batch, call.heads, *call.lengths)
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
    off = (out * grad.double()).square().sum(-1, keepdim=True).sqrt() * step * call.scale
    carried = off * query.double()
    spread = dense.with_gradients(query, key, key, _stopped(score_mod), mask_mod, call.scale, carried, True)
    rest = step / 8
    found = (rest * out.norm(), (off * spread[0]).norm(), spread[4].norm(), rest * d_value.norm())
    return tuple(float(f) + 1e-6 for f in found)


def too_far(
    call: Call, found: tuple[torch.Tensor, ...], qkv: list[torch.Tensor], grad: torch.Tensor,
    found_lse: torch.Tensor | None = None, rival: tuple[torch.Tensor, ...] | None = None,
) -> dict[str, str]:  # fmt: skip
    """By name of result what is wrong: an error over twice that of stock precision, NaNs, rows that see no key.

    `found` is out, dQ, dK and dV, or the first of them; `found_lse` the natural log-sum-exp. Stock precision is
    emulated, which leaves out what only flash attention does, such as weights from a log-sum-exp in float32; where
    results of stock's own kernels are at hand, as `rival`, the error of these counts where it is the larger.
    """
    (out, lse, *exact), (stock_out, stock_lse, *stock) = (call.reference(qkv, grad, exact=e) for e in (True, False))
    blind, unseen = (lse == -math.inf).unsqueeze(-1), (exact[2] == 0).all(-1, keepdim=True)
    hidden = {"out": blind, "dQ": blind, "dK": unseen, "dV": unseen}
    wrong: dict[str, str] = {}
    limits = floors(call, qkv, grad, out, exact[2])
    others = rival or (stock_out, *stock)
    results = (found, (out, *exact), (stock_out, *stock), others, limits)
    for name, f, e, s, o, floor in zip(NAMES, *results, strict=False):
        if not torch.equal(f.isnan(), e.isnan()):
            wrong[name] = f"{int(f.isnan().sum())} NaNs, expected {int(e.isnan().sum())}"
        elif bool((f * hidden[name]).any()):
            wrong[name] = "not zero in rows that see no key, or at keys that no row sees"
        elif not (error := float((f - e).norm())) <= (allowed := 2 * _larger((s - e).norm(), (o - e).norm()) + floor):
            wrong[name] = f"off by {error:.2e}, allowed {allowed:.2e}, size {float(e.norm()):.2e}"
    if found_lse is not None and (off := _lse_off(found_lse, lse, stock_lse, ROUNDOFF[call.dtype])):
        wrong["lse"] = off
    return wrong


def _larger(*errors: torch.Tensor) -> float:
    """Of errors that are numbers."""
    return max((float(e) for e in errors if e.isfinite()), default=math.nan)


def _lse_off(found: torch.Tensor, exact: torch.Tensor, stock: torch.Tensor, roundoff: float) -> str | None:
    """What is wrong with a log-sum-exp: off by d it scales weights by 1 + d, which rounding them does, too."""
    if not torch.equal(found == -math.inf, exact == -math.inf) or not torch.equal(found.isnan(), exact.isnan()):
        return "-inf or NaN in other rows than it should be"
    judged = exact.isfinite()
    errors = [(t.double() - exact)[judged].abs() for t in (found, stock)]
    over = errors[0] - (2 * errors[1].max() + roundoff + 2**-17 * exact[judged].abs()) if judged.any() else errors[0]
    worst = int(over.argmax()) if len(over) else -1
    return f"a row is off by {float(errors[0][worst]):.2e}" if worst >= 0 and over[worst] > 0 else None
