"""Generated BlockMasks, agreeing with their mask_mods or not, that change from step to step, and what stock
flex_attention computes with them, by its definition: a pair is visible if its block is listed, and is full or the
mask_mod holds.

Knows nothing of the backend's decisions. tests/compile runs these on the CPU, tests/gpu on the GPU.
"""

import random
from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention, noop_mask

from cudnn_flex_compile.report.report import collect

BATCH, HEADS, DIM = 2, 4, 64
TENSORS = [f"{full}{of}_{what}" for full in ("", "full_") for of in ("kv", "q") for what in ("num_blocks", "indices")]
# Lengths and block sizes of each device. Stock's kernels take multiples of their own tiles alone, 128 on an H200.
SIZES = {
    "cpu": (
        [(160, 160), (128, 128), (257, 200), (130, 300), (64, 320)],
        [(128, 128), (64, 64), (128, 64), (64, 128), (256, 128)],
    ),
    "cuda": (
        [(320, 320), (256, 256), (513, 400), (260, 600), (64, 640)],
        [(128, 128), (256, 256), (256, 128), (128, 256)],
    ),
}
MASKS = {
    "none": lambda given: noop_mask,
    "causal": lambda given: lambda b, h, q, kv: q >= kv,
    "window": lambda given: lambda b, h, q, kv: (q >= kv) & (q - kv < 70),
    "by head": lambda given: lambda b, h, q, kv: q + 40 * h >= kv,
    "lengths": lambda given: lambda b, h, q, kv: kv < given.ends[b],
    "padding": lambda given: lambda b, h, q, kv: (q >= kv) & given.padding[b, kv],
    "documents": lambda given: lambda b, h, q, kv: given.ids[q] == given.ids[kv],
}
SCORES = {
    "plain": lambda given: None,
    "soft cap": lambda given: lambda s, b, h, q, kv: torch.tanh(s / 2) * 2,
    "slopes": lambda given: lambda s, b, h, q, kv: s - given.slopes[h] * (q - kv).abs(),
    "hides": lambda given: lambda s, b, h, q, kv: torch.where(kv % 5 != 3, s, -torch.inf),
}
CHANGES = ("unchanged", "agrees", "random", "random in place", "captured", "agrees in place")


@dataclass
class Given:
    """What mods capture; changed in place."""

    ends: torch.Tensor
    padding: torch.Tensor
    ids: torch.Tensor
    slopes: torch.Tensor

    @staticmethod
    def drawn(generator, lengths, device):
        columns, longest = lengths[1], max(lengths)
        ends = torch.randint(1, columns + 1, (BATCH,), generator=generator)
        padding = torch.rand(BATCH, longest, generator=generator) > 0.3
        ids = torch.randint(0, 3, (longest,), generator=generator).sort().values
        return Given(*(t.to(device) for t in (ends, padding, ids, torch.rand(HEADS, generator=generator) / 8)))

    def change(self, other):
        for mine, new in ((self.ends, other.ends), (self.padding, other.padding), (self.ids, other.ids)):
            mine.copy_(new)


class Case:
    """One compiled function, and the BlockMasks of its steps.

    Args:
        agreeing: how often the BlockMask of the first step has the blocks of its mask_mod.
    """

    def __init__(self, seed, device, agreeing=1.0):
        self.seed, self.device = seed, device
        choose = self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.lengths, self.blocks = map(choose.choice, SIZES[device])
        self.mask, self.score = list(MASKS)[self.seed % len(MASKS)], choose.choice(list(SCORES))
        self.shape = choose.choice((1, BATCH)), choose.choice((1, HEADS))
        self.kv_heads, self.full = choose.choice((HEADS, HEADS // 2)), choose.random() < 0.7
        self.first = choose.random() < agreeing  # whether the blocks of the first step are those of the mask_mod
        self.given = Given.drawn(self.generator, self.lengths, self.device)
        self.mask_mod, self.score_mod = MASKS[self.mask](self.given), SCORES[self.score](self.given)

    def __str__(self):
        return f"{self.seed}: {self.score}, {self.mask}, {self.lengths}, {self.blocks}, {self.shape}, full {self.full}"

    def function(self):
        score_mod, gqa = self.score_mod, self.kv_heads != HEADS
        return lambda q, k, v, mask: flex_attention(q, k, v, score_mod, mask, enable_gqa=gqa)

    def inputs(self):
        (rows, columns), heads = self.lengths, self.kv_heads
        sizes = ((rows, HEADS), (columns, heads), (columns, heads))
        tensors = [torch.randn(BATCH, *size, DIM, generator=self.generator).transpose(1, 2) for size in sizes]
        return [t.to(self.device, torch.bfloat16).requires_grad_() for t in tensors]

    def masks(self, steps):
        """A BlockMask for each step."""
        mask = self._block_mask(*self._patterns(self.first))
        yield "agrees" if self.first else "random", mask
        for _ in range(steps - 1):
            change = self.random.choice(CHANGES)
            if change == "captured":  # the blocks are those of what was captured before
                self.given.change(Given.drawn(self.generator, self.lengths, self.device))
            elif change != "unchanged":
                new = self._block_mask(*self._patterns(change.startswith("agrees")))
                mask = _copied(new, mask) if change.endswith("in place") else new
            yield change, mask

    def pairs(self):
        """Where the mask_mod holds, [B, H, Sq, Skv]."""
        sizes = (BATCH, HEADS, *self.lengths)
        views = [[-1 if i == d else 1 for i in range(4)] for d in range(4)]
        at = [torch.arange(n, device=self.device).view(view) for n, view in zip(sizes, views, strict=True)]
        return self.mask_mod(*at).expand(sizes), at

    def _patterns(self, agreeing):
        """Which blocks are partial, and which are full: those that the mask_mod needs and any others, or any at all."""
        rows, columns = (-(-n // b) for n, b in zip(self.lengths, self.blocks, strict=True))
        shape = (*self.shape, rows, columns)
        some, other = (torch.rand(shape, generator=self.generator).to(self.device) for _ in range(2))
        if not agreeing:
            return some < 0.5, (some > 0.7) & self.full  # none is both: stock would count its pairs twice
        pad = columns * self.blocks[1] - self.lengths[1], rows * self.blocks[0] - self.lengths[0]
        tiled = [
            torch.nn.functional.pad(self.pairs()[0], (0, pad[0], 0, pad[1]), value=fill)
            .unflatten(3, (columns, -1)).unflatten(2, (rows, -1)) for fill in (False, True)
        ]  # fmt: skip
        needed, every = tiled[0].any(-1).any(3), tiled[1].all(-1).all(3)
        for dim, size in enumerate(self.shape):
            if size == 1:
                needed, every = needed.any(dim, keepdim=True), every.all(dim, keepdim=True)
        full = every & (other < 0.6) & self.full
        return (needed | (some < 0.2)) & ~full, full

    def _block_mask(self, partial, full):
        more = _listed(full) if self.full else (None, None)
        return BlockMask.from_kv_blocks(*_listed(partial), *more, self.blocks, self.mask_mod, self.lengths)

    def expected(self, query, key, value, mask, grad):
        """Output and gradients in float64."""
        pairs, at = self.pairs()
        partial = dense_blocks(mask.kv_num_blocks, mask.kv_indices)
        full = dense_blocks(mask.full_kv_num_blocks, mask.full_kv_indices) if self.full else torch.zeros_like(partial)
        rows, columns = at[2].view(-1, 1) // self.blocks[0], at[3].view(-1) // self.blocks[1]
        visible = (pairs & partial[:, :, rows, columns]) | full[:, :, rows, columns]
        leaves = [t.detach().double().requires_grad_() for t in (query, key, value)]
        keys, values = (t.repeat_interleave(HEADS // self.kv_heads, 1) for t in leaves[1:])
        scores = leaves[0] @ keys.transpose(2, 3) / DIM**0.5
        scores = self.score_mod(scores, *at) if self.score_mod else scores
        shown = visible & (scores > -torch.inf)
        least = torch.finfo(torch.float64).min
        weights = torch.softmax(torch.where(shown, scores, least), -1) * shown
        out = weights @ values
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def _listed(pattern):
    order = torch.argsort((~pattern).to(torch.int8), dim=-1, stable=True)
    return pattern.sum(-1).to(torch.int32), order.to(torch.int32)


def as_mask_mod(mask):
    """A mask_mod that says all that a BlockMask with full blocks says now: its blocks, and its own mask_mod."""
    partial, full = (
        dense_blocks(getattr(mask, f"{kind}kv_num_blocks").clone(), getattr(mask, f"{kind}kv_indices").clone())
        for kind in ("", "full_")
    )
    rows, columns = mask.BLOCK_SIZE

    def visible(b, h, q, kv):
        where = (b * (len(partial) > 1), h * (partial.shape[1] > 1), q // rows, kv // columns)
        return (mask.mask_mod(b, h, q, kv) & partial[where]) | full[where]

    return visible


def dense_blocks(count, indices):
    used = torch.arange(indices.shape[-1], device=count.device) < count.unsqueeze(-1)
    return torch.zeros_like(indices, dtype=torch.bool).scatter(-1, indices.long(), used)


def _copied(new, mask):
    """The same BlockMask, its tensors with new contents."""
    for name in TENSORS:
        if getattr(mask, name) is not None:
            getattr(mask, name).copy_(getattr(new, name))
    return mask


def check(case, steps, training, **options):
    """Runs a compiled function for some steps. Returns what became of its call.

    Raises AssertionError with the case and the step where the numbers are not those of stock. On the CPU stock
    flex_attention honours no blocks, unless Inductor compiles it: a call that is kept is run, and not compared.
    """
    torch._dynamo.reset()
    with collect() as report:
        run = torch.compile(case.function(), backend="cudnn_flex", options={"lower": "always", **options})
        for step, (change, mask) in enumerate(case.masks(steps)):
            qkv = case.inputs()
            grad = torch.randn(qkv[0].shape, generator=case.generator).to(qkv[0])
            with torch.set_grad_enabled(training):
                found = [run(*qkv, mask)]
            if report.kept and case.device == "cpu":
                continue
            found += torch.autograd.grad(found[0], qkv, grad) if training else []
            for name, f, e in zip(("out", "dQ", "dK", "dV"), found, case.expected(*qkv, mask, grad), strict=False):
                off, size = float((f.detach().double() - e).norm()), float(e.norm())
                assert off <= 2**-6 * size + 1e-6, f"case {case}: step {step} ({change}): {name} off by {off} of {size}"
    assert len(report.calls) == 1, f"case {case}: compiled {len(report.calls)} times"
    return report.calls[0]
