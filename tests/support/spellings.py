"""Spellings of flex_attention's arguments, in the manner of PyTorch's own tests: what people give, usual or not.

Knows nothing of the package under test. Each spelling is a function of bfloat16 queries, keys and values.
"""

# ruff: noqa: B008 (defaults stand for what a closure would capture)

import functools

import numpy
import torch
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
    noop_mask,
    or_masks,
)

B, H, S, D = 2, 2, 128, 16
SPELLINGS = {}


def inputs():
    torch.manual_seed(0)
    return [torch.randn(B, H, S, D, dtype=torch.bfloat16) for _ in range(3)]


def spelled(name, call):
    assert name not in SPELLINGS
    SPELLINGS[name] = call


def with_score(name, score_mod):
    spelled(name, lambda q, k, v: flex_attention(q, k, v, score_mod))


def with_mask(name, mask_mod, heads=None, **how):
    mask = create_block_mask(mask_mod, None, heads, S, S, device="cpu", **how)
    spelled(f"mask: {name}", lambda q, k, v: flex_attention(q, k, v, block_mask=mask))


def causal(b, h, q, kv):
    return q >= kv


# Captured values
VECTOR, NUMBERS = torch.linspace(-1, 1, S), torch.arange(S)
PAIRS, TABLE = torch.randn(H, S, S), torch.randn(B, H, S, 4)
for dtype in (
    torch.float64,
    torch.float16,
    torch.int8,
    torch.int16,
    torch.uint8,
    torch.int32,
    torch.bool,
    torch.uint16,
):
    values = (VECTOR * 3).to(dtype)
    with_score(f"captured {dtype}", lambda s, b, h, i, j, t=values: s + t[j])
with_score("captured complex", lambda s, b, h, i, j, t=VECTOR.to(torch.complex64): s + t[j].real)
with_score("captured 0-d", lambda s, b, h, i, j, t=torch.tensor(1.5): s * t)
with_score("captured 0-d int", lambda s, b, h, i, j, t=torch.tensor(3): torch.where(j < t, s, -1.0))
with_score("captured 0-d item", lambda s, b, h, i, j, t=torch.tensor(1.5): s * t.item())
with_score("captured one element", lambda s, b, h, i, j, t=torch.tensor([1.5]): s * t[0])
with_score("captured empty", lambda s, b, h, i, j, t=torch.zeros(0): s + t.sum())
with_score("captured view", lambda s, b, h, i, j, t=PAIRS.transpose(1, 2)[:, ::2]: s + t[h, i // 2, j])
with_score("captured expanded", lambda s, b, h, i, j, t=VECTOR.expand(H, S): s + t[h, j])
with_score("captured sparse", lambda s, b, h, i, j, t=torch.eye(S).to_sparse(): s + t[i, j])
with_score("captured requires grad", lambda s, b, h, i, j, t=VECTOR.clone().requires_grad_(): s + t[j])
with_score("captured learned factor", lambda s, b, h, i, j, t=VECTOR.clone().requires_grad_(): s * t[j])
with_score("captured parameter", lambda s, b, h, i, j, t=torch.nn.Parameter(VECTOR.clone()): s + t[i])
for kind in (numpy.float32, numpy.float64, numpy.int64, numpy.bool_):
    with_score(f"numpy {kind.__name__}", lambda s, b, h, i, j, n=kind(1): s * n)
with_score("numpy array", lambda s, b, h, i, j, t=numpy.arange(S, dtype=numpy.float32): s + torch.from_numpy(t)[j])
for number in (2, True, 2.5, float("inf"), 2**40):
    with_score(f"number {number}", lambda s, b, h, i, j, n=number: torch.where(i - j < n, s, s * 0.5))
with_score("captured list", lambda s, b, h, i, j, t=(1.0, 2.0): s * t[0] + t[1])
with_score("captured dict", lambda s, b, h, i, j, t={"scale": 2.0}: s * t["scale"])


def changing(q, k, v):
    """A number that is another one at each call."""
    out = q
    for n in (2, 3):
        out = flex_attention(out, k, v, lambda s, b, h, i, j, n=n: s * n)
    return out


spelled("changing numbers", changing)


# Functions
class Callable:
    def __init__(self):
        self.scale = torch.tensor([1.0, 2.0])

    def __call__(self, s, b, h, i, j):
        return s * self.scale[h]

    def method(self, s, b, h, i, j):
        return self(s, b, h, i, j)


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(8, H)

    def forward(self, s, b, h, i, j):
        return s + self.table.weight[(i - j).clamp(0, 7), h]


def times(s, b, h, i, j, *, factor=2.0):
    return s * factor


def outer():
    def middle(t):
        def inner(s, b, h, i, j):
            return s + t[i]

        return inner

    return middle(VECTOR)


def long(count):
    def mod(s, b, h, i, j):
        for _ in range(count):
            s = s + 0.001 * (i - j)
        return s

    return mod


def doubling(s, b, h, i, j):
    for _ in range(40):
        i = i + i % 7
    return s + i


def noisy(s, b, h, i, j):
    SEEN.append(1)
    return s * 2


SEEN = []
with_score("partial", functools.partial(times, factor=0.5))
with_score("default argument", times)
with_score("callable", Callable())
with_score("bound method", Callable().method)
with_score("module", Module())
with_score("closure in closure", outer())
with_score("ignored by the compiler", torch.compiler.disable(times))
with_score("long", long(150))
with_score("too long", long(300))
with_score("doubling", doubling)
with_score("side effect", noisy)
with_score("print", lambda s, b, h, i, j: (print(end=""), s)[1])
with_score("cond", lambda s, b, h, i, j: torch.cond(h > 0, lambda x: x * 2, lambda x: x + 1, (s,)))
with_score("python if on data", lambda s, b, h, i, j: s * 2 if h > 0 else s)
with_score("dot", lambda s, b, h, i, j: s + torch.dot(TABLE[b, h, i], TABLE[b, h, j]))
with_score("einsum", lambda s, b, h, i, j: s + torch.einsum("d,d->", TABLE[b, h, i], TABLE[b, h, j]))
with_score("sum of a row", lambda s, b, h, i, j: s + (TABLE[b, h, i] * TABLE[b, h, j]).sum())
with_score("vmap inside", lambda s, b, h, i, j: s + torch.vmap(lambda x: x * 2)(VECTOR)[j])
with_score("random", lambda s, b, h, i, j: s + torch.rand(()))
with_score("dropout", lambda s, b, h, i, j: torch.nn.functional.dropout(s, 0.1, True))
with_score("condition on the score", lambda s, b, h, i, j: torch.where(s > 0, s, s * 0.5))
with_score("index from the score", lambda s, b, h, i, j: s + VECTOR[s.to(torch.int64).clamp(0, 9)])
with_score("constant", lambda s, b, h, i, j: torch.zeros_like(s))
with_score("double", lambda s, b, h, i, j: (s.double() * 2).float())
with_score("shape of a capture", lambda s, b, h, i, j: s * VECTOR.shape[0])
with_score("list of tensors", lambda s, b, h, i, j: torch.stack([s, s * 2]).sum())
with_score("bits", lambda s, b, h, i, j: torch.where((i ^ j) & 3 == 0, s, s - 1))
with_score("bitwise shifts by data", lambda s, b, h, i, j: s + (NUMBERS[j] >> h) * 0.01)
with_score("detach", lambda s, b, h, i, j: s + s.detach())
with_score("in place", lambda s, b, h, i, j: s.clone().add_(1.0))
with_score("einops-like view", lambda s, b, h, i, j: s.view(1).squeeze(0).reshape(()))

# Scales
for scale in (None, 0.5, 1, 0, -0.25, numpy.float32(0.5), numpy.float64(0.5), True, float("inf")):
    spelled(f"scale {scale!r}", lambda q, k, v, scale=scale: flex_attention(q, k, v, scale=scale))
spelled("scale of a size", lambda q, k, v: flex_attention(q, k, v, scale=1 / q.shape[2]))
spelled("scale tensor", lambda q, k, v: flex_attention(q, k, v, scale=torch.tensor(0.5)))
spelled("scale item", lambda q, k, v: flex_attention(q, k, v, scale=q.sum().item()))

# Options and outputs
for options in (
    {"BACKEND": "TRITON"}, {"BACKEND": "FLASH"}, {"BACKEND": "AUTO"}, {"FORCE_USE_FLEX_ATTENTION": True}, {},
    {"PRESCALE_QK": True}, {"ROWS_GUARANTEED_SAFE": True}, {"BLOCKS_ARE_CONTIGUOUS": True},
    {"BLOCK_M": 64, "BLOCK_N": 64},
    {"fwd_num_stages": 2}, {"unknown": 1}, {"USE_TMA": True}, {"OUTPUT_LOGSUMEXP": True},
):  # fmt: skip
    spelled(f"options {options}", lambda q, k, v, o=options: flex_attention(q, k, v, kernel_options=dict(o)))
spelled("return_lse", lambda q, k, v: flex_attention(q, k, v, return_lse=True))
for aux in (AuxRequest(lse=True), AuxRequest(max_scores=True), AuxRequest()):
    spelled(f"aux {aux}", lambda q, k, v, aux=aux: flex_attention(q, k, v, return_aux=aux))

# Tensors
spelled("grouped queries", lambda q, k, v: flex_attention(q, k[:, :1], v[:, :1], enable_gqa=True))
spelled("keys of batch 1", lambda q, k, v: flex_attention(q, k[:1], v[:1]))
spelled("empty batch", lambda q, k, v: flex_attention(q[:0], k[:0], v[:0]))
spelled("no queries", lambda q, k, v: flex_attention(q[:, :, :0], k, v))
spelled("no keys", lambda q, k, v: flex_attention(q, k[:, :, :0], v[:, :, :0]))
spelled("one query", lambda q, k, v: flex_attention(q[:, :, :1], k, v))
spelled("one key", lambda q, k, v: flex_attention(q, k[:, :, :1], v[:, :, :1]))
spelled("one of each", lambda q, k, v: flex_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1]))
spelled("odd head dim", lambda q, k, v: flex_attention(q[..., :7], k[..., :7], v))
spelled("values of another head dim", lambda q, k, v: flex_attention(q, k, v[..., :8]))
spelled(
    "transposed", lambda q, k, v: flex_attention(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)))
)
spelled("strided", lambda q, k, v: flex_attention(q[:, :, ::2], k[:, :, ::2], v[:, :, ::2]))
spelled("expanded heads", lambda q, k, v: flex_attention(q, k[:, :1].expand_as(q), v[:, :1].expand_as(q)))
for dtype in (torch.float32, torch.float64, torch.float16):
    spelled(f"{dtype}", lambda q, k, v, dtype=dtype: flex_attention(*(t.to(dtype) for t in (q, k, v))))
spelled("mixed dtypes", lambda q, k, v: flex_attention(q, k.to(torch.float16), v))
spelled("by keyword", lambda q, k, v: flex_attention(query=q, key=k, value=v, score_mod=times, scale=0.5))
spelled("twice", lambda q, k, v: flex_attention(flex_attention(q, k, v), k, v))

# BlockMasks
with_mask("causal", causal)
with_mask("and_masks", and_masks(causal, lambda b, h, q, kv: q - kv < 32))
with_mask("or_masks", or_masks(causal, lambda b, h, q, kv: kv < 8))
with_mask("noop", noop_mask)
with_mask("constant", lambda b, h, q, kv: q.new_ones((), dtype=torch.bool))
with_mask("heads", lambda b, h, q, kv: q >= kv + h, heads=H)
with_mask("block of two sizes", causal, BLOCK_SIZE=(64, 128))
with_mask("block of a list", causal, BLOCK_SIZE=[128, 64])
with_mask("bools", lambda b, h, q, kv, t=NUMBERS % 3 > 0: t[q] & t[kv])
with_mask("vector in a mask", lambda b, h, q, kv: (TABLE[0, 0, q] > TABLE[0, 0, kv]).any())
MASK = create_block_mask(causal, None, None, S, S, device="cpu", BLOCK_SIZE=64)
LISTS = MASK.kv_num_blocks, MASK.kv_indices, MASK.full_kv_num_blocks, MASK.full_kv_indices
spelled(
    "made in the graph",
    lambda q, k, v: flex_attention(
        q, k, v, block_mask=create_block_mask(causal, None, None, q.shape[2], k.shape[2], device=q.device)
    ),
)
spelled(
    "from_kv_blocks",
    lambda q, k, v, m=BlockMask.from_kv_blocks(*LISTS, 64, causal): flex_attention(q, k, v, block_mask=m),
)
spelled(
    "blocks alone",
    lambda q, k, v, m=BlockMask.from_kv_blocks(*LISTS[:2], BLOCK_SIZE=64): flex_attention(q, k, v, block_mask=m),
)
spelled("adjusted", lambda q, k, v: flex_attention(q[:, :, :100], k, v, block_mask=MASK._adjust(100, S)))
spelled("sliced rows", lambda q, k, v: flex_attention(q[:, :, :64], k, v, block_mask=MASK[:, :, 0]))
spelled("a longer mask", lambda q, k, v: flex_attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], block_mask=MASK))


# Sizes that depend on data, nested regions
def picked(q, k, v):
    tokens = q.transpose(1, 2).reshape(B * S, H, D)
    some = tokens[tokens[:, 0, 0] > 0].unsqueeze(0).transpose(1, 2)
    return flex_attention(some, some, some, lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf")))


@torch.compiler.nested_compile_region
def region(q, k, v):
    return flex_attention(q, k, v)


spelled("picked tokens", picked)


@torch.compiler.nested_compile_region
def forced(q, k, v):
    return flex_attention(q, k, v, kernel_options={"BACKEND": "TRITON"})


spelled("a region called twice", lambda q, k, v: region(region(q, k, v), k, v))
spelled("a kept region called twice", lambda q, k, v: forced(forced(q, k, v), k, v))
spelled("number from data", lambda q, k, v: flex_attention(q, k, v, lambda s, b, h, i, j, n=q.sum().item(): s * n))
spelled(
    "length from data",
    lambda q, k, v: flex_attention(q, k, v, lambda s, b, h, i, j, n=(q > 0).sum().item(): torch.where(j < n, s, -1.0)),
)
