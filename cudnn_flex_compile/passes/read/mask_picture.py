"""Draws the mask of a call, from the tensors that it captured.

passes/describe.py asks for it where a report is collected. The mask is evaluated at about a million sampled pairs, so
that the time does not grow with the lengths.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from cudnn_flex_compile.passes.read.call import Call, example, hint
from cudnn_flex_compile.passes.read.captures import Captures
from cudnn_flex_compile.report.picture import Picture
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.interpret import const_tensor, environment, evaluate
from cudnn_flex_compile.scoremod.ir import F32, I32, Expr, Program
from cudnn_flex_compile.scoremod.partition import Hoisted
from cudnn_flex_compile.scoremod.saturate import exact

CELLS = (64, 128)  # rows and columns of a picture, at most
SAMPLES = (128, 8192)  # rows and columns at which the mask is evaluated, evenly spread, at most
UNKNOWN = "the mask reads tensors that are computed in the graph"


def sketch(
    call: Call, program: Program, hoisted: Sequence[Hoisted], captures: Captures, real: dict[Node, Any]
) -> Picture | str:
    """The picture of the mask for batch entry 0 and head 0 of the call that is being compiled, or why there is none.

    Args:
        hoisted: the operands of the program.
        real: the graph's inputs, by placeholder.
    """
    operands = {int(n.value or 0): hoisted[int(n.value or 0)] for n in ir.walk(program.mask) if n.kind == "operand"}
    leaves = list(ir.walk(program.mask, *(part.expression for part in operands.values())))
    values = {n: _value(captures.nodes[n], real) for n in leaves if n.kind in ("capture", "scalar")}
    if any(value is None for value in values.values()):
        return UNKNOWN
    lengths = hint(example(call.query).shape[2]), hint(example(call.key).shape[2])
    with torch.no_grad():
        visible = _visible(program.mask, operands, values, lengths, example(call.query).device)
        grid = min(lengths[0], CELLS[0]), min(lengths[1], CELLS[1])
        cells = torch.nn.functional.adaptive_avg_pool2d(visible.float()[None], grid)[0].tolist()
    axes = {n.value for n in leaves if n.kind == "index"}
    of = [name for axis, name in (("b", "batch entry 0"), ("h", "head 0")) if axis in axes]
    return Picture(tuple(map(tuple, cells)), lengths, ", ".join(of))


def _value(captured: Any, real: dict[Node, Any]) -> Any:
    """The captured value of this call; None if it is not at hand."""
    value = real.get(captured) if isinstance(captured, Node) else captured
    return value if value is None or isinstance(value, torch.Tensor) else hint(value)


def _visible(
    mask: Expr, hoisted: dict[int, Hoisted], values: dict[Expr, Any], lengths: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Whether each of the sampled pairs is visible, [rows, columns], bool."""
    rows, columns = (_spread(n, most, device) for n, most in zip(lengths, SAMPLES, strict=True))
    zero = torch.zeros((1, 1), dtype=torch.int32, device=device)
    indices = {"b": zero, "h": zero, "q": rows[:, None], "k": columns[None]}
    outside = _outside(indices, values, device)
    operands: dict[int, torch.Tensor] = {}
    for number, part in hoisted.items():
        value = evaluate(part.expression, outside)
        operands[number] = (value.clamp(0, lengths[1]) if part.limit else value).to(part.stored)
    known = {int(n.value or 0): int(v) for n, v in values.items() if (n.kind, n.dtype) == ("scalar", I32)}
    ints = dict(enumerate(exact((mask,), [known.get(i, 0) for i in range(1 + max(known, default=-1))])))
    floats = {int(n.value or 0): float(v) for n, v in values.items() if (n.kind, n.dtype) == ("scalar", F32)}
    leaf = environment(torch.zeros((1, 1), device=device), indices, operands, ints, floats)
    return evaluate(mask, leaf).expand(len(rows), len(columns))


def _outside(
    indices: dict[str, torch.Tensor], values: dict[Expr, Any], device: torch.device
) -> Callable[[Expr], torch.Tensor]:
    """The leaves of the expressions that are computed outside of the kernel."""

    def leaf(node: Expr) -> torch.Tensor:
        if node.kind == "index":
            return indices[str(node.value)]
        if node.kind == "const":
            return const_tensor(node, device)
        value = values[node]
        return value if isinstance(value, torch.Tensor) else torch.full((1, 1), value, device=device)

    return leaf


def _spread(length: int, most: int, device: torch.device) -> torch.Tensor:
    """So many indices below a length, evenly spread, int32."""
    count = min(length, most)
    return (torch.arange(count, device=device) * length // count).to(torch.int32)
