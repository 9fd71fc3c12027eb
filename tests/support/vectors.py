"""Generated calls whose score_mod adds dots of rows of captured tensors to the score.

Knows nothing of the package. A call is drawn by its number. Its exact results and stock precision are those of dense
attention in float64 and float32. The output of eager flex_attention in float64 is compared with it; eager
flex_attention has no gradients where a mod reads vectors.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

BATCH, HEADS, ROWS, COLUMNS = 2, 4, 40, 56

SPELLINGS: dict[str, Callable] = {
    "sum": lambda x, y: (x * y).sum(),
    "sum(-1)": lambda x, y: (x * y).sum(-1),
    "torch.sum": lambda x, y: torch.sum(y * x, dim=0),
    "keepdim": lambda x, y: (x * y).sum(0, keepdim=True).squeeze(0),
    "in float32": lambda x, y: (x.float() * y.float()).sum(-1),
    "dot": torch.dot,
    "vdot": lambda x, y: torch.vdot(y, x),
    "matmul": torch.matmul,
    "@": lambda x, y: y @ x,
    "inner": torch.inner,
    "vecdot": torch.linalg.vecdot,
    "tensordot": lambda x, y: torch.tensordot(x, y, 1),
    "einsum": lambda x, y: torch.einsum("d,d->", x, y),
    "matrices": lambda x, y: (x[None] @ y[:, None]).squeeze(),
    "matrix and vector": lambda x, y: (x.unsqueeze(0) @ y).squeeze(0),
    "scaled inside": lambda x, y: (x * y * 0.5).sum(-1) * 2,
    "divided inside": lambda x, y: (x * y / 4).sum(-1) * 4,
    "negative": lambda x, y: -(-x * y).sum(),
    "halves": lambda x, y: (x * y + y * x).sum() * 0.5,
}
# How a row of queries is read, by the axes of its tensor: b, h, two heads together as g, q, and 1 for a constant.
OF_QUERIES = ("bhq", "bhq", "bgq", "hq", "bq", "q", "hbq", "qbh", "1hq", "bh")
# The same for keys: g is the heads that share a key, o all heads together.
OF_KEYS = ("bgk", "bgk", "bok", "gk", "bk", "k", "gbk", "kbg", "1gk")
FACTORS = ("scale", "scale", "one", "power", "negative", "any", "of data", "of heads")
OUTER: dict[str, Callable] = {
    "nothing": lambda x, h, q, kv: x,
    "soft cap": lambda x, h, q, kv: torch.tanh(x / 20) * 20,
    "slopes": lambda x, h, q, kv: x + (h + 1) * 0.1 * (kv - q),
    "scaled": lambda x, h, q, kv: x * 0.7,
    "twice": lambda x, h, q, kv: x * torch.sigmoid(x),
    "hidden": lambda x, h, q, kv: torch.where(kv <= q + 20, x, -float("inf")),
}
MASKS: dict[str, Callable | None] = {
    "none": None,
    "causal": lambda b, h, q, kv: q + 16 >= kv,
    "window": lambda b, h, q, kv: (q + 16 >= kv) & (q - kv < 9),
    "dilated": lambda b, h, q, kv: (q - kv) % 3 == 0,
}


@dataclass(frozen=True)
class Call:
    """A call.

    Attributes:
        words: what was drawn.
        tensors: query, key, value, the two captured tensors of vectors, and a captured factor, [H] or 0-d.
        grad: the output's gradient.
        learned: the names of tensors that require grad.
    """

    words: dict[str, object]
    tensors: dict[str, torch.Tensor]
    scale: float | None
    grad: torch.Tensor
    learned: tuple[str, ...]

    @property
    def usual_scale(self) -> float:
        return self.scale or self.tensors["query"].shape[3] ** -0.5

    @property
    def mask_mod(self) -> Callable | None:
        return MASKS[str(self.words["mask"])]

    def score_mod(self, t: dict[str, torch.Tensor]) -> Callable:
        spelled, outer = SPELLINGS[str(self.words["spelling"])], OUTER[str(self.words["outer"])]

        def score_mod(s, b, h, q, kv):
            dot = self.factor(t, h) * spelled(*self.rows(t, b, h, q, kv))
            return outer(s + dot if self.words["order"] else dot + s, h, q, kv)

        return score_mod

    def rows(self, t, b, h, q, kv):
        group = HEADS // self.tensors["key"].shape[1]
        return (
            _read(t["of_query"], str(self.words["of_query"]), {"b": b, "h": h, "g": h // 2, "q": q, "1": 1}),
            _read(t["of_key"], str(self.words["of_key"]),
                  {"b": b, "g": h // group if group > 1 else h, "o": h // HEADS, "k": kv, "1": -1}),
        )  # fmt: skip

    def factor(self, t, h):
        match self.words["factor"]:
            case "scale":
                return self.usual_scale
            case "of data":
                return t["factor"]
            case "of heads":
                return t["factor"][h]
            case kind:
                return {"one": 1.0, "power": 0.25, "negative": -0.5, "any": 0.3}[str(kind)]

    def attend(self, device: str = "cpu") -> Callable:
        """The call as a user writes it: a function of the tensors, in order."""
        block_mask = None
        if self.mask_mod is not None:
            lengths = self.tensors["query"].shape[2], self.tensors["key"].shape[2]
            block_mask = create_block_mask(self.mask_mod, None, None, *lengths, device)

        def attend(*tensors):
            t = dict(zip(self.tensors, tensors, strict=True))
            qkv = t["query"], t["key"], t["value"]
            return flex_attention(*qkv, self.score_mod(t), block_mask, scale=self.scale, enable_gqa=True)

        return attend

    def leaves(self, dtype: torch.dtype | None = None, device: str = "cpu") -> list[torch.Tensor]:
        return [
            t.detach().to(device, dtype or t.dtype, copy=True).requires_grad_(name in self.learned)
            for name, t in self.tensors.items()
        ]

    def dense(self, exact: bool, on_gpu: bool = False) -> list[torch.Tensor]:
        """The output and gradients of dense attention with the dots of all pairs: in float64, or in stock precision.

        Stock's kernels compute in float32, but for weights and an output that are rounded, and round each gradient
        once. On a GPU, they round weights and the scores' gradients in the backward, too.
        """
        work = torch.float64 if exact else torch.float32
        leaves = self.leaves(torch.float64 if exact else None)
        t = {name: leaf.to(work) for name, leaf in zip(self.tensors, leaves, strict=True)}
        scores, visible = self._scores(t)
        masked = torch.where(visible, scores, -torch.inf)
        weights = torch.where(visible.any(-1, keepdim=True), masked.softmax(-1), 0.0)
        values, narrow = t["value"].repeat_interleave(HEADS // t["value"].shape[1], dim=1), leaves[0].dtype
        out = weights.to(narrow).to(work) @ values
        with torch.no_grad():
            grad = self.grad.to(work)
            delta = (grad * out.to(narrow)).sum(-1, keepdim=True)
            of_scores = torch.where(visible, weights * (grad @ values.mT - delta), 0.0)
            if on_gpu and not exact:
                of_scores, weights = (x.to(narrow).to(work) for x in (of_scores, weights))
            of_values = (weights.mT @ grad).unflatten(1, (t["value"].shape[1], -1)).sum(2)
        wanted = [leaf for leaf in leaves if leaf.requires_grad and leaf is not leaves[2]]
        found = iter(torch.autograd.grad(scores, wanted, of_scores))
        gradients = [of_values.to(narrow) if t is leaves[2] else next(found) for t in leaves if t.requires_grad]
        return [out.detach().to(narrow), *gradients]

    def _scores(self, t):
        group = HEADS // t["key"].shape[1]
        scores = t["query"] @ t["key"].repeat_interleave(group, dim=1).mT * self.usual_scale
        along = ([-1 if i == dim else 1 for i in range(4)] for dim in range(4))
        b, h, q, kv = (torch.arange(n).view(shape) for n, shape in zip(scores.shape, along, strict=True))
        rows = self.rows(t, b, h, q, kv)
        dot = self.factor(t, h) * (rows[0] * rows[1]).sum(-1)
        scores = OUTER[str(self.words["outer"])](scores + dot, h, q, kv)
        visible = (scores > -torch.inf) & (self.mask_mod(b, h, q, kv) if self.mask_mod else torch.tensor(True))
        return scores, visible

    def gradients(self, out, leaves) -> list[torch.Tensor]:
        learned = [t for t in leaves if t.requires_grad]
        return list(torch.autograd.grad(out, learned, self.grad.to(out.device, out.dtype)))


def _read(tensor, axes, index):
    return tensor[tuple(index[axis] for axis in axes)]


def drawn(number: int, rows: int = ROWS, columns: int = COLUMNS) -> Call:
    """The call of a number."""
    draw, generator = random.Random(number), torch.Generator().manual_seed(number)
    dtype = draw.choice((torch.bfloat16, torch.bfloat16, torch.float16))
    kv_heads, dim, lanes = draw.choice((4, 2, 1)), draw.choice((16, 32, 64)), draw.choice((2, 4, 8, 12, 24))
    more = draw.choice((0, 0, 3))  # captured tensors may be larger than what is read
    words = {
        "dtype": dtype, "kv_heads": kv_heads, "dim": dim, "lanes": lanes, "spelling": draw.choice(list(SPELLINGS)),
        "of_query": draw.choice(OF_QUERIES), "of_key": draw.choice(OF_KEYS),
        "factor": draw.choice(FACTORS if dtype == torch.bfloat16 else FACTORS[:1]), "outer": draw.choice(list(OUTER)),
        "mask": draw.choice(list(MASKS)), "order": draw.choice((True, False)),
        "scale": draw.choice((None, None, 0.125, 0.3)), "trained": draw.choice(("all", "all", "vectors", "query")),
    }  # fmt: skip

    def normal(*shape, to=dtype):
        return torch.randn(shape, generator=generator).to(to)

    sizes = {"b": BATCH, "h": HEADS, "q": rows + more, "1": 2}
    key_sizes = {"b": BATCH, "g": kv_heads, "o": 1, "k": columns + more, "1": 2}
    order = draw.choice(((0, 1, 2), (0, 2, 1), (2, 0, 1)))  # of queries in memory
    query = normal(*((BATCH, HEADS, rows)[i] for i in order), dim)
    tensors = {
        "query": query.permute(*(order.index(i) for i in range(3)), 3),
        "key": normal(BATCH, kv_heads, columns, dim), "value": normal(BATCH, kv_heads, columns, dim),
        "of_query": normal(*({**sizes, "g": 2}[axis] for axis in words["of_query"]), lanes),
        "of_key": normal(*(key_sizes[axis] for axis in words["of_key"]), lanes),
        "factor": normal(*((HEADS,) if words["factor"] == "of heads" else ()), to=torch.float32),
    }  # fmt: skip
    learned = {"all": list(tensors)[:5], "vectors": ["of_query", "of_key"], "query": ["query", "of_key"]}
    return Call(words, tensors, words["scale"], normal(BATCH, HEADS, rows, dim), tuple(learned[str(words["trained"])]))


def eager(call: Call) -> torch.Tensor:
    """The output of eager flex_attention in float64, which takes no tensor that requires grad on the CPU."""
    return call.attend()(*(leaf.detach() for leaf in call.leaves(torch.float64)))


def names(call: Call) -> list[str]:
    return ["out", *(f"d {name}" for name in call.tensors if name in call.learned)]


def wrong(call: Call, found: list[torch.Tensor], on_gpu: bool = False) -> list[str]:
    """What is further off than twice stock precision, in words."""
    exact, stock = call.dense(exact=True), call.dense(exact=False, on_gpu=on_gpu)
    assert bool((exact[0] - eager(call)).norm() <= 1e-5 * exact[0].norm()), "the reference is another function"
    said = []
    for name, f, e, s in zip(names(call), found, exact, stock, strict=True):
        error, usual = (float((x.detach().cpu().double() - e).norm() / e.norm()) for x in (f, s))
        said += [] if error <= 2 * usual else [f"{name}: off by {error:.2e}, in stock precision by {usual:.2e}"]
    return said
