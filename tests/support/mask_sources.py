"""Masks written as source, with what they capture: by brute force, and what each step of the compiler makes of them.

Knows nothing of random generation nor of cuDNN.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from cudnn_flex_compile.passes.write.operands import operand_value
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.aten_table import dtype_of
from cudnn_flex_compile.scoremod.interpret import environment, evaluate
from cudnn_flex_compile.scoremod.ir import I32, TRUE, Expr, Program
from cudnn_flex_compile.scoremod.masks.form import as_predicate, split
from cudnn_flex_compile.scoremod.masks.intervals import VIEWS
from cudnn_flex_compile.scoremod.masks.linear import KV
from cudnn_flex_compile.scoremod.masks.solve import Solved, solve
from cudnn_flex_compile.scoremod.optable import make
from cudnn_flex_compile.scoremod.partition import partition
from cudnn_flex_compile.scoremod.ranges import narrow
from cudnn_flex_compile.scoremod.simplify import normalize
from cudnn_flex_compile.scoremod.trace import Captured, trace

CPU = torch.device("cpu")
Captures = Mapping[str, torch.Tensor | int]
Sizes = tuple[int, int, int, int]
NOTHING: Captures = MappingProxyType({})


def used(source: str, captured: Captures) -> Captures:
    """The captures that the source names."""
    return {name: value for name, value in captured.items() if name in compile(source, "", "eval").co_names}


def function(source: str, captured: Captures = NOTHING) -> Callable[..., torch.Tensor]:
    """(b, h, q, kv, *captured)"""
    return eval(f"lambda {', '.join(['b', 'h', 'q', 'kv', *captured])}: {source}", {"torch": torch})


def leaves(captured: Captures) -> list[Expr]:
    """An integer is a scalar, a tensor a capture; positions are those in `captured`."""
    return [
        ir.scalar(i, I32) if isinstance(value, int) else ir.capture(i, dtype_of(value.dtype))
        for i, value in enumerate(captured.values())
    ]


def normal(source: str, captured: Captures = NOTHING) -> Program:
    """The normalized program, over captures."""
    given = zip(captured.values(), leaves(captured), strict=True)
    inputs = [Captured(None if isinstance(value, int) else value, leaf) for value, leaf in given]
    return normalize(ir.program(mask=narrow(trace(function(source, captured), False, inputs, CPU))))


def brute_force(source: str, captured: Captures, sizes: Sizes) -> torch.Tensor:
    """[B, H, Q, K]: the function on every (b, h, q, kv), as flex_attention defines it."""
    grid = torch.meshgrid(*(torch.arange(n, dtype=torch.int32) for n in sizes), indexing="ij")
    over_pairs = torch.vmap(function(source, captured), in_dims=(0,) * 4 + (None,) * len(captured))
    with TransformGetItemToIndex():
        return over_pairs(*(axis.flatten() for axis in grid), *captured.values()).view(sizes)


def visible(mask: Expr, captured: Captures, sizes: Sizes, operands: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    """[B, H, Q, K]: an expression, by the interpreter."""
    values = list(captured.values())
    ints = {i: value for i, value in enumerate(values) if isinstance(value, int)}
    spans = zip(VIEWS, sizes, strict=True)
    axes = {axis: torch.arange(n, dtype=torch.int32).view(VIEWS[axis]) for axis, n in spans}
    rest = environment(torch.zeros(()), axes, dict(enumerate(operands)), ints, {})
    return evaluate(mask, lambda leaf: values[leaf.value] if leaf.kind == "capture" else rest(leaf)).expand(sizes)


def conjunction(solved: Solved) -> Expr:
    """All parts of a solved mask as one expression."""
    parts = [bound.predicate() for bound in solved.bounds]
    parts += [make("gt", end, KV) for end in solved.ends] + [make("ge", KV, start) for start in solved.starts]
    result = TRUE
    for part in (*parts, solved.columns, solved.residual):
        result = make("and", result, part)
    return result


def assert_every_step_keeps(source: str, captured: Captures, sizes: Sizes) -> Solved:
    """Solving, partition and the normal form each mean what the source means. Returns the solved mask."""
    captured = used(source, captured)
    expected, program = brute_force(source, captured, sizes), normal(source, captured)
    solved = solve(program.mask)
    assert torch.equal(visible(conjunction(solved), captured, sizes), expected), solved
    inside, hoisted = partition(program)
    known = dict(zip(leaves(captured), captured.values(), strict=True))
    operands = [operand_value(part, known.__getitem__, sizes, CPU) for part in hoisted]
    for mask in (inside.mask, as_predicate(split(inside.mask))):
        assert torch.equal(visible(mask, captured, sizes, operands), expected), hoisted
    return solved


def described(solved: Solved) -> str:
    """What a mask became: constants of bounds, and the axes of everything else, as in "lower 0, end[q]"."""
    bounds = [f"{b.side} {b.constant}{' + terms' * bool(b.terms)}" for b in solved.bounds]
    limits = [f"{side}[{ir.axes_of(x)}]" for side in ("start", "end") for x in getattr(solved, f"{side}s")]
    columns, residual = solved.columns, solved.residual
    parts = [f"columns[{ir.axes_of(columns)}]"] * (columns is not TRUE) + ["residual"] * (residual is not TRUE)
    return ", ".join(bounds + limits + parts)
