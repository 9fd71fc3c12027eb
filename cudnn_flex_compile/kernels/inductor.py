"""Runs a program by Inductor's flex_attention, where a new shape has no certified plan, and where a BlockMask disagrees
with its mask_mod.

cuda.py calls it. The model is not recompiled: only this call is, once for a program, and once more when its sizes
change, which are symbolic from then on.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from cudnn_flex_compile.kernels.arguments import Arguments
from cudnn_flex_compile.kernels.recompiling import Recompiling
from cudnn_flex_compile.kernels.stock import Stock
from cudnn_flex_compile.scoremod.interpret import environment, evaluate
from cudnn_flex_compile.scoremod.ir import Program
from cudnn_flex_compile.scoremod.learned import position_in
from cudnn_flex_compile.scoremod.saturate import exact
from cudnn_flex_compile.scoremod.text import parse

PROGRAMS = 64  # the number of programs whose kernels are kept, the last ones


def mods_of(
    program: Program, operands: Sequence[Tensor], ints: Sequence[int | Tensor], floats: Sequence[float | Tensor],
    captured: Sequence[Tensor] = (),
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:  # fmt: skip
    """A stock score_mod and mask_mod that compute the program."""

    def leaves(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Any:
        def pick(tensor: Tensor) -> Tensor:
            where = [i if n > 1 else torch.zeros_like(i) for i, n in zip((b, h, q, kv), tensor.shape, strict=True)]
            return tensor[where[0], where[1], where[2], where[3]]

        near = {i: pick(t) for i, t in enumerate(operands)}
        indices = {"b": b, "h": h, "q": q, "k": kv}
        return environment(score, indices, near, dict(enumerate(ints)), dict(enumerate(floats)), captured=captured)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return evaluate(program.score, leaves(score.float(), b, h, q, kv))

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return evaluate(program.mask, leaves(torch.zeros_like(q, dtype=torch.float32), b, h, q, kv))

    return score_mod, mask_mod


def score_mod_of(
    program: Program, operands: Sequence[Tensor], ints: Sequence[int | Tensor], floats: Sequence[float | Tensor]
) -> Any:
    """A stock score_mod that computes the program, with -inf where the mask does not hold."""
    modified, visible = mods_of(program, operands, ints, floats)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return torch.where(visible(b, h, q, kv), modified(score, b, h, q, kv), float("-inf"))

    return score_mod


def _attention(query: Tensor, key: Tensor, value: Tensor, score_mod: Any, scale: float, gqa: bool) -> Any:
    return _with_lse(query, key, value, {"score_mod": score_mod, "scale": scale, "enable_gqa": gqa})


def _attention_by_blocks(
    query: Tensor, key: Tensor, value: Tensor, mods: Any, blocks: dict[str, Any], block_sizes: tuple[int, int],
    scale: float, gqa: bool,
) -> Any:  # fmt: skip
    score_mod, mask_mod = mods
    how: dict[str, Any] = {"BLOCK_SIZE": block_sizes, "mask_mod": mask_mod}
    lengths = query.shape[2], key.shape[2]
    if blocks["q_num_blocks"] is None:
        block_mask = BlockMask.from_kv_blocks(blocks["kv_num_blocks"], blocks["kv_indices"], seq_lengths=lengths, **how)
    else:
        block_mask = BlockMask(lengths, **blocks, **how)
    how = {"score_mod": score_mod, "block_mask": block_mask, "scale": scale, "enable_gqa": gqa}
    return _with_lse(query, key, value, how)


def _with_lse(query: Tensor, key: Tensor, value: Tensor, how: dict[str, Any]) -> tuple[Tensor, Any]:
    # `return_lse` would warn once, and Dynamo then compiles again, even while a CUDA graph is captured.
    out, aux = flex_attention(query, key, value, **how, return_aux=AuxRequest(lse=True))  # pyright: ignore
    return out, aux.lse


@functools.lru_cache(PROGRAMS)
def _compiled(program: str) -> Callable[..., Any]:
    return Recompiling(_attention, program)


@functools.lru_cache(PROGRAMS)
def _compiled_by_blocks(program: str, block_sizes: tuple[int, int]) -> Callable[..., Any]:
    return Recompiling(_attention_by_blocks, f"{program} {block_sizes}")


def forward(
    query: Tensor, key: Tensor, value: Tensor, given: Arguments, stock: Stock | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and the natural log-sum-exp [B, H, Sq]. With `stock`, its blocks and its program count."""
    # Captured tensors: Dynamo makes a float that changes symbolic, and flex_attention fails with it. An integer of more
    # than 31 bits came out wrong as a constant. (torch 2.11, an H200: tests/gpu/test_numbers.py)
    numbers = [torch.full((), float(f), dtype=torch.float32, device=query.device) for f in given.floats]
    gqa = query.shape[1] != key.shape[1]
    program = parse(given.program if stock is None else stock.program)
    exact_ints = exact((program.score, program.mask), given.ints)
    ints = [torch.full((), i, dtype=torch.int64, device=query.device) for i in exact_ints]
    if stock is None:
        score_mod = score_mod_of(program, given.operands, ints, numbers)
        return _compiled(given.program)(query, key, value, score_mod, given.scale, gqa)
    mods = mods_of(program, given.operands, ints, numbers, stock.captured)
    tensors = query, stock.own_order(key), stock.own_order(value)
    compiled = _compiled_by_blocks(stock.program, stock.block_sizes)
    return compiled(*tensors, mods, stock.named_blocks(), stock.block_sizes, given.scale, gqa)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, given: Arguments,
    stock: Stock | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dQ, dK, dV, and the gradient of the learned operand, if there is one, contiguous and in its dtype.

    It computes the forward again, and needs autograd to be on.
    """
    position, operands = position_in(given.program), [t.detach() for t in given.operands]
    stock = stock and stock.detached()
    learned = [] if position is None else [position]
    leaves = [t.detach().requires_grad_() for t in (query, key, value, *(operands[i] for i in learned))]
    for i in learned:
        operands[i] = leaves[3]
    out, lse = forward(leaves[0], leaves[1], leaves[2], given._replace(operands=operands), stock)
    if grad_lse is None:
        return torch.autograd.grad(out, leaves, grad_out)
    return torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
