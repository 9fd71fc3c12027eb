"""Every mask and mod of attn-gym that needs no kernel of its own, at a length, with its dense reference.

Knows nothing of the package: attn-gym's functions, torch's flex_attention, and dense attention.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from attn_gym import masks, mods
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.support import dense

BATCH, HEADS, HEAD_DIM = 2, 4, 64


@dataclass(frozen=True)
class Case:
    """One call. `kv_heads` below HEADS is grouped-query attention; a mask that reads b or h is `per_head`.

    `exact_mod` is the score_mod where it computes with captured tensors, which then are float64.
    """

    q_len: int
    kv_len: int
    score_mod: Callable | None = None
    mask_mod: Callable | None = None
    kv_heads: int = HEADS
    per_head: bool = False
    exact_mod: Callable | None = None


def masked(mask_mod, q_len, kv_len=None, **how):
    return Case(q_len, kv_len or q_len, mask_mod=mask_mod, **how)


def scored(score_mod, length, mask_mod=None, **how):
    return Case(length, length, score_mod, mask_mod, **how)


def cuts(n, device):
    """Offsets of five documents, one of a single token."""
    return torch.tensor([0, n // 8, n // 2, n // 2 + 1, n * 3 // 4, n], dtype=torch.int32, device=device)


def normal(*shape, device):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


def side(n, multiple=1):
    """Of the largest square of at most n tokens."""
    return math.isqrt(n) // multiple * multiple


def flamingo(n, device, images=5):
    """Text before the first image sees none."""
    edges = torch.arange(images + 1, dtype=torch.int32, device=device) * (n // (images + 1)) + n // 16
    intervals = torch.stack([edges[:-1], edges[1:]], dim=1)
    mask_mod = masks.generate_vision_cross_attention_mask_mod(intervals, n // 10)
    return masked(mask_mod, n, images * (n // 10))


def jetspec_tree(n, device):
    nodes = n // 3
    ancestors = masks.build_tree_ancestor_matrix([(node - 1) // 2 for node in range(nodes)], device)
    return masked(masks.generate_jetspec_tree_causal_mask_mod(n - nodes, ancestors), nodes, n)


def jetspec_training(n, block=16):
    prefix, length = n // 4, n * 3 // 4 // block * block
    return masked(masks.generate_jetspec_training_mask_mod(prefix, block), length, prefix + length)


def natten_morton(n):
    s = 1 << side(n).bit_length() - 1
    return masked(masks.generate_morton_natten(s, s, 7, 5), s * s)


def shared_prefix(n, device):
    prefix_of = torch.tensor([0, 0, 0, 3, 3], dtype=torch.int32, device=device)
    return masked(masks.generate_shared_prefix_mask_mod(cuts(n, device), prefix_of), n)


def sta_2d(n, text=20):
    s = side(n - text, 4)
    return masked(masks.generate_sta_mask_mod_2d((s, s), (12, 12), (4, 4), text), s * s + text)


def svg(n, generate, frames=7, **how):
    prompt = n // 8
    a_frame = (n - prompt) // frames
    return masked(generate(prompt, frames, a_frame, **how), prompt + frames * a_frame)


def vsa(n, device, padded=False, tile=64):
    tiles = n // tile
    chosen = normal(BATCH, HEADS, tiles, tiles, device=device).topk(2).indices.to(torch.int32)
    sizes = torch.full((tiles,), tile, device=device) - torch.arange(tiles, device=device) % 3 * 10
    mask_mod = masks.generate_vsa_mask_mod(chosen, tile, sizes if padded else None)
    return masked(mask_mod, tiles * tile, per_head=True)


def graph(n, device):
    """Symmetric adjacency matrices [BATCH, n, n]: a path, and a few edges more."""
    node = torch.arange(n, device=device)
    edges = (normal(BATCH, n, n, device=device) > 3) & (node > node[:, None]) | (node == node[:, None] + 1)
    return edges | edges.mT


def graphormer_spatial(n, device, far=8):
    distances = mods.shortest_path_distances(graph(n, device), far)
    return scored(mods.generate_graphormer_spatial_bias(normal(HEADS, far + 2, device=device), distances), n)


def graphormer_edge(n, device, types=5, hops=3):
    edges = torch.arange(n * n, device=device).view(n, n).remainder(types).expand(BATCH, n, n)
    paths = mods.shortest_path_edge_types(graph(n, device), edges, hops)
    return scored(mods.generate_graphormer_edge_bias(normal(HEADS, hops, types, device=device), *paths), n)


def mla_rope(n, device, dim=16):
    tables = [normal(BATCH, heads, n, dim, device=device).bfloat16() for heads in (HEADS, 1)]
    score_mod, exact_mod = (
        mods.generate_mla_rope_score_mod(*(t.to(dtype) for t in tables), HEADS, scale=0.125)
        for dtype in (torch.bfloat16, torch.float64)
    )
    return scored(score_mod, n, kv_heads=1, exact_mod=exact_mod)


# By attn-gym's file, then what of it: functions of (length, at least 192, and device). Lengths that a mask dictates
# are as near as it can be below.
CASES: dict[str, Callable[[int, str], Case]] = {
    "batchify": lambda n, device: masked(masks.batchify_mask_mod(masks.causal_mask, n // 4), n),
    "block_diffusion": lambda n, device: masked(masks.generate_block_diffusion_mask(n // 2, 16), n // 2 * 2),
    "causal": lambda n, device: masked(masks.causal_mask, n),
    "dilated_sliding_window": lambda n, device: masked(masks.generate_dilated_sliding_window(n // 4, 3), n),
    "document_mask": lambda n, device: masked(masks.generate_doc_mask_mod(masks.causal_mask, cuts(n, device)), n),
    "document_mask: packed": lambda n, device: masked(masks.generate_packed_causal_doc_mask_mod(cuts(n, device)), n),
    "flamingo": flamingo,
    "global_sliding_window": lambda n, device: masked(
        masks.generate_global_sliding_window(n // 8, torch.arange(n, device=device) % (n // 3) == 1), n),
    "jetspec: tree": jetspec_tree,
    "jetspec: training": lambda n, device: jetspec_training(n),
    "natten": lambda n, device: masked(masks.generate_natten(side(n), side(n), 7, 5), side(n) ** 2),
    "natten: tiled": lambda n, device: masked(
        masks.generate_tiled_natten(side(n, 8), side(n, 8), 7, 5, 8, 8), side(n, 8) ** 2),
    "natten: Morton": lambda n, device: natten_morton(n),
    "prefix_lm": lambda n, device: masked(masks.generate_prefix_lm_mask(n // 4), n),
    "shared_prefix": shared_prefix,
    "sliding_window": lambda n, device: masked(masks.generate_sliding_window(n // 4), n),
    "sta: 2d": lambda n, device: sta_2d(n),
    "sta: 3d": lambda n, device: masked(
        masks.generate_sta_mask_mod_3d((n // 64, 8, 8), (3, 6, 4), (1, 2, 4)), n // 64 * 64),
    "svg: spatial": lambda n, device: svg(n, masks.generate_spatial_head_mask_mod, attn_sink=True, round_width=16),
    "svg: temporal": lambda n, device: svg(n, masks.generate_temporal_head_mask_mod),
    "vsa": vsa,
    "vsa: padded tiles": lambda n, device: vsa(n, device, padded=True),
    "activation: gelu": lambda n, device: scored(mods.generate_activation_score_mod(), n),
    "activation: relu": lambda n, device: scored(mods.generate_activation_score_mod(torch.relu), n),
    "alibi, causal": lambda n, device: scored(mods.generate_alibi_bias(HEADS), n, masks.causal_mask),
    "graphormer: spatial": graphormer_spatial,
    "graphormer: edge": graphormer_edge,
    "latent_attention": mla_rope,
    "sandwich, causal": lambda n, device: scored(
        mods.generate_sandwich_bias(HEADS, n, device=device), n, masks.causal_mask),
    "softcapping": lambda n, device: scored(mods.generate_tanh_softcap(2), n),
}  # fmt: skip


def inputs(case, device, dtype=torch.bfloat16):
    """query, key, value and the output's gradient, [B, H, S, D] in memory order [B, S, H, D]."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(case.q_len, HEADS), (case.kv_len, case.kv_heads), (case.kv_len, case.kv_heads), (case.q_len, HEADS)]
    drawn = (torch.randn(BATCH, n, h, HEAD_DIM, generator=generator) for n, h in sizes)
    return [t.to(device, dtype).transpose(1, 2) for t in drawn]


def call_of(case, device):
    """The call as a user writes it."""
    score_mod, grouped, over = case.score_mod, case.kv_heads != HEADS, (BATCH, HEADS) if case.per_head else (None, None)
    mask = create_block_mask(case.mask_mod, *over, case.q_len, case.kv_len, device) if case.mask_mod else None
    return lambda q, k, v: flex_attention(q, k, v, score_mod, mask, enable_gqa=grouped)


def _over_pairs(function, takes_score):
    """`function` of 0-d tensors on all of them, as flex_attention defines it."""
    score = (0,) if takes_score else ()
    for axis in (3, 2, 1, 0):
        function = torch.vmap(function, in_dims=score + tuple(0 if i == axis else None for i in range(4)))

    def over_pairs(*arguments):
        with TransformGetItemToIndex():
            return function(*arguments[:-4], *(index.flatten() for index in arguments[-4:]))

    return over_pairs


def reference(case, query, key, value, grad, exact):
    """out, lse, dQ, dK, dV by tests/support/dense.py."""
    score_mod = case.exact_mod or case.score_mod
    score_mod = score_mod and _over_pairs(score_mod, True)
    mask_mod = case.mask_mod and _over_pairs(case.mask_mod, False)
    return dense.with_gradients(query, key, value, score_mod, mask_mod, HEAD_DIM**-0.5, grad, exact)
