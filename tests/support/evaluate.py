"""Evaluates a user's function directly, and an expression by the interpreter, on every (b, h, q, kv) at once.

The direct value is the reference: torch.vmap of the function over 0-d tensors, as flex_attention defines it.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from cudnn_flex_compile.passes.write.operands import operand_value
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.aten_table import dtype_of
from cudnn_flex_compile.scoremod.interpret import environment, evaluate
from cudnn_flex_compile.scoremod.ir import Expr, Program
from cudnn_flex_compile.scoremod.partition import Hoisted
from cudnn_flex_compile.scoremod.ranges import narrow
from cudnn_flex_compile.scoremod.trace import Captured, trace

from .generate import CAPTURED, B, H, K, Mod, Q

CPU = torch.device("cpu")
SIZES = (B, H, Q, K)
PAIRS = B * H * Q * K
LEAVES = {name: ir.capture(i, dtype_of(tensor.dtype)) for i, (name, tensor) in enumerate(CAPTURED.items())}
NAME = {leaf: name for name, leaf in LEAVES.items()}


def indices() -> dict[str, torch.Tensor]:
    """b, h, q and kv of every element, int32 [PAIRS]."""
    grid = torch.tensor(list(itertools.product(*(range(n) for n in SIZES))), dtype=torch.int32)
    return {axis: grid[:, i].contiguous() for i, axis in enumerate(ir.AXES)}


def scores(high: bool = False) -> torch.Tensor:
    """[PAIRS]: normal ones, and every multiple of a quarter up to 3.5 in size, where clamps and ties are."""
    dtype = torch.float64 if high else torch.float32
    values = torch.randn(PAIRS, generator=torch.Generator().manual_seed(1)) * 2
    values[::4] = (torch.arange(PAIRS) % 29 - 14)[::4] / 4
    return values.to(dtype)


def raised(tensor: torch.Tensor, high: bool) -> torch.Tensor:
    return tensor.double() if high and tensor.is_floating_point() else tensor


def direct(mod: Mod, score: torch.Tensor | None = None) -> torch.Tensor:
    """The function's value, [PAIRS]; in float64 throughout if the score is."""
    high = score is not None and score.dtype == torch.float64
    inputs = [*([score] if mod.takes_score else []), *indices().values()]
    tensors = [raised(t, high) for t in mod.tensors]
    over_pairs = torch.vmap(mod.function(high), in_dims=(0,) * len(inputs) + (None,) * len(tensors))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if high else torch.float32)  # of integers that are divided
    try:
        with TransformGetItemToIndex():
            return over_pairs(*inputs, *tensors)
    finally:
        torch.set_default_dtype(default)


def traced(mod: Mod) -> Expr:
    captured = [Captured(CAPTURED[name], LEAVES[name]) for name in mod.names]
    return trace(mod.function(), mod.takes_score, captured, CPU)


def program_of(score: Mod | None, mask: Mod | None) -> Program:
    """As the pass makes it, before it is normalized."""
    return ir.program(
        ir.SCORE if score is None else narrow(traced(score)), ir.TRUE if mask is None else narrow(traced(mask))
    )


def leaf_values(
    score: torch.Tensor, operands: Sequence[torch.Tensor] = (), grad: torch.Tensor | None = None
) -> Callable[[Expr], torch.Tensor]:
    flat = {i: t.expand(SIZES).reshape(-1) for i, t in enumerate(operands)}
    environment_leaf = environment(score, indices(), flat, {}, {}, grad)
    high = score.dtype == torch.float64
    return lambda node: raised(CAPTURED[NAME[node]], high) if node.kind == "capture" else environment_leaf(node)


def interpreted(
    root: Expr, score: torch.Tensor, operands: Sequence[torch.Tensor] = (), grad: torch.Tensor | None = None
) -> torch.Tensor:
    """[PAIRS]"""
    value = evaluate(root, leaf_values(score, operands, grad), score.dtype == torch.float64)
    return value.expand(PAIRS)


def masked(program: Program, score: torch.Tensor, operands: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    """[PAIRS]: the modified score where it is visible, -inf elsewhere."""
    visible = interpreted(program.mask, score, operands)
    return torch.where(visible, interpreted(program.score, score, operands), -math.inf)


def operands_of(hoisted: Sequence[Hoisted]) -> list[torch.Tensor]:
    return [operand_value(h, lambda leaf: CAPTURED[NAME[leaf]], SIZES, CPU) for h in hoisted]


def differing(got: torch.Tensor, expected: torch.Tensor) -> int:
    """How many elements differ; NaNs are equal, and so are the two zeros."""
    return int((~((got == expected) | (got.isnan() & expected.isnan()))).sum())
