"""Computes operands from captured tensors.

It runs on tensors (certification, the CPU), and on FX proxies, where it writes the nodes that compute an operand into
the surrounding graph.
"""

from collections.abc import Callable
from typing import Any

import torch

from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import TORCH_DTYPE, evaluate
from cudnn_flex_compile.scoremod.ir import I32, Expr
from cudnn_flex_compile.scoremod.masks.intervals import VIEWS
from cudnn_flex_compile.scoremod.partition import Hoisted
from cudnn_flex_compile.scoremod.saturate import INT64_LIMIT, compared

LENGTH = ir.intern("scalar", I32, value=-1)  # the number of keys


def _size_of(tensor: Any, dim: int) -> Any:
    return tensor.shape[dim]


def computed(
    hoisted: Hoisted, captured: Callable[[Expr], Any], sizes: tuple[Any, ...], device: torch.device,
    size_of: Callable[[Any, int], Any] = _size_of,
) -> Any:  # fmt: skip
    """The operand, [B or 1, H or 1, Sq or 1, Skv or 1].

    Args:
        hoisted: the expression of the operand, and the dtype in which it is kept.
        captured: the tensor or number of a capture or scalar leaf.
        sizes: the sizes of the axes b, h, q, k.
        device: the device of the result.
        size_of: the size of what `captured` gives.
    """
    only_compared = compared((hoisted.expression,))

    def leaf(node: Expr) -> Any:
        if node.kind == "index":
            axis = str(node.value)
            span = torch.arange(sizes[ir.AXES.index(axis)], dtype=torch.int32, device=device)
            return span.view(VIEWS[axis])
        if node.kind == "const":
            number: Any = node.value
            return torch.full((1, 1, 1, 1), number, dtype=TORCH_DTYPE[node.dtype], device=device)
        if node is LENGTH:
            return torch.full((1, 1, 1, 1), sizes[3], dtype=torch.int32, device=device)
        if node.kind == "scalar" and node.dtype == I32:
            number = torch.full((1, 1, 1, 1), captured(node), dtype=torch.int64, device=device)
            return number.clamp(-INT64_LIMIT, INT64_LIMIT) if node.value in only_compared else number
        return captured(node)

    value = evaluate(hoisted.expression, leaf, size=size_of)
    if hoisted.limit:
        value = value.clamp(0, sizes[3])
    shape = [size if axis in hoisted.dims else 1 for axis, size in zip(ir.AXES, sizes, strict=True)]
    return value.to(hoisted.stored).expand(*shape).contiguous()
