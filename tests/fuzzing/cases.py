"""Random calls by seed and number: functions, lengths, heads, head dims, layouts, dtypes, directions.

Knows nothing of the package under test.
"""

import random

import torch

from tests.support.generate_masks import BATCH, FORMS, Forms, Sources
from tests.support.generated import LEAST_LIMIT, NUMBERS, Call, sees
from tests.support.layouts import GRADIENTS, LAYOUTS

LENGTHS = (1, 2, 7, 17, 33, 63, 64, 65, 100, 127, 128, 129, 191, 200, 256, 257, 320, 333, 448, 512, 577, 960, 1000)
MOST_PAIRS = 5_000_000  # times heads and batch: what a reference in float64 computes, several times over
HEADS = ((1, 1), (2, 2), (3, 3), (4, 4), (4, 2), (4, 1), (6, 2), (8, 8), (8, 2))  # of queries, of keys
DIMS = (64, 64, 64, 128, 128, 32, 40, 72, 80, 96, 160, 192, 256)
VALUE_DIMS = (32, 64, 96, 128)
TRIES = 20

# Scores beyond those of generate_masks.py. Kinks are where few scores are: an error of the score turns up there as an
# error of the whole gradient, in stock precision as in any other.
SMOOTH = (
    "torch.tanh({s})", "torch.sigmoid({s})", "F.silu({s})", "F.gelu({s})", "F.gelu({s}, approximate='tanh')",
    "torch.cos({s})", "({c} - {s})", "({s} / (torch.abs({s}) + 0.5))", "torch.exp({s}.clamp(max=2.0))",
    "torch.log(torch.square({s}) + 0.25)", "torch.sqrt(torch.square({s}) + 0.25)", "torch.exp2({s} * 0.25)",
    "torch.rsqrt(torch.square({s}) + 0.5)", "torch.reciprocal(torch.square({s}) + 0.5)", "F.relu({s} + 3)",
    "{s}.clamp(-3, 4)", "torch.maximum({s}, {s} - 1.0)", "torch.where({p}, {s}, {s} * scales[h])", "torch.erf({s})",
    "({s} + {s} * 0.25)", "({s} * both[b, h])", "({s} + soft[q, kv])",
    "({s} ** 2)", "({s} + torch.sin(q * 0.1))", "({s} * (kv + 1) / {l})",
)  # fmt: skip
PLAIN = ("score", "score", "(20 * torch.tanh(score / 20))", "(score + slopes[h] * (kv - q))", "(score * scales[h])")
LIKE_USERS = ("(q >= kv)", "((q >= kv) & (q - kv <= {m}))", "(torch.abs(q - kv) <= {m})", "(kv < lengths[b])")


def case(seed: int, number: int) -> Call:
    """The call of this number; nine of ten leave something visible."""
    chance = random.Random(f"{seed} {number}")
    found = drawn(number, chance)
    for _ in range(TRIES if number % 10 else 0):
        if sees(found) or max(found.lengths) <= 2:
            break
        found = drawn(number, chance)
    return found


def drawn(number: int, chance: random.Random) -> Call:
    heads, kv_heads = chance.choice(HEADS)
    batch = chance.randint(1, BATCH)
    lengths = _lengths(batch * heads, chance)
    score, mask = _functions(max(*lengths, LEAST_LIMIT), chance)
    dim = chance.choice(DIMS)
    training = chance.random() < 0.7
    return Call(
        number, score, mask, lengths, kv_heads,
        dtype=chance.choice((torch.bfloat16, torch.float16)),
        as_block_mask=chance.random() < 0.5,
        batch=batch,
        heads=heads,
        dims=(dim, chance.choice(VALUE_DIMS) if chance.random() < 0.2 else dim),
        layout="BSHD" if chance.random() < 0.4 else chance.choice(list(LAYOUTS)),
        grad_layout="BSHD" if chance.random() < 0.5 else chance.choice(list(GRADIENTS)),
        training=training,
        lse=not training and chance.random() < 0.5,
    )  # fmt: skip


def _lengths(scores: int, chance: random.Random) -> tuple[int, int]:
    while True:
        first = chance.choice(LENGTHS)
        lengths = (first, first if chance.random() < 0.6 else chance.choice(LENGTHS))
        if scores * lengths[0] * lengths[1] <= MOST_PAIRS:
            return lengths


def _functions(limit: int, chance: random.Random) -> tuple[str | None, str | None]:
    sources = Sources(chance.choice, {**NUMBERS, "l": (limit,)}, forms(chance.random() < 0.5))
    kind = chance.choice(("score", "mask", "both", "both"))
    depth = 1 if chance.random() < 0.8 else 2
    score = sources.score(depth) if kind != "mask" else None
    mask = sources.mask(depth) if kind != "score" else None
    if mask is not None and chance.random() < 0.25:
        mask = sources.of(chance.choice(LIKE_USERS))
    return score, mask


def forms(smooth: bool) -> Forms:
    """Those of generate_masks.py, with more scores."""
    leaves, ops = FORMS["s"]
    return {**FORMS, "s": (leaves + PLAIN, ops + SMOOTH if smooth else ops)}
