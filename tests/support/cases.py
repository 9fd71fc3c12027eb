"""One call of generated functions: its exact value by brute force, and what each step of the compiler makes of it.

Knows nothing of how functions are generated. All calls of the package that the tests of generated masks need are here.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from cudnn_flex_compile.engine.graph.lowering import Lowering
from cudnn_flex_compile.engine.graph.strategies import STRATEGIES
from cudnn_flex_compile.engine.guards import guarded
from cudnn_flex_compile.engine.problem import FORWARD, Problem, TensorSpec, out_spec
from cudnn_flex_compile.engine.support import refused
from cudnn_flex_compile.passes.write.operands import operand_value
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.aten_table import HALVES, dtype_of
from cudnn_flex_compile.scoremod.interpret import environment, evaluate
from cudnn_flex_compile.scoremod.ir import F32, I32, TRUE, Expr, Program
from cudnn_flex_compile.scoremod.masks.boxes import Box, boxes, pruned, unshifted
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.partition import ScoreGather, partition
from cudnn_flex_compile.scoremod.ranges import narrow
from cudnn_flex_compile.scoremod.simplify import normalize
from cudnn_flex_compile.scoremod.text import parse, text
from cudnn_flex_compile.scoremod.trace import Captured, trace
from tests.support.emulator import emulated

from .evaluate import raised
from .generate import Mod
from .generate_masks import CAPTURED, FLOATS, INTS

CPU = torch.device("cpu")
NUMBERS: dict[str, float] = {name: CAPTURED[name].item() for name in (*INTS, *FLOATS)}
LEAVES = {name: ir.capture(i, dtype_of(tensor.dtype)) for i, (name, tensor) in enumerate(CAPTURED.items())}
LEAVES |= {name: ir.scalar(i, I32) for i, name in enumerate(INTS)}
LEAVES |= {name: ir.scalar(i, F32) for i, name in enumerate(FLOATS)}
NAMES = {leaf: name for name, leaf in LEAVES.items()}
INT_VALUES = {i: int(NUMBERS[name]) for i, name in enumerate(INTS)}
FLOAT_VALUES = {i: NUMBERS[name] for i, name in enumerate(FLOATS)}
STORED = {LEAVES[name]: tensor.dtype for name, tensor in CAPTURED.items() if tensor.dtype in HALVES}
REFUSED = (ScoreGather,)


@cache
def axes(sizes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Of each axis its index, int32, shaped to broadcast."""
    shapes = ([-1 if d == i else 1 for d in range(4)] for i in range(4))
    return {a: torch.arange(n, dtype=torch.int32).view(s) for a, n, s in zip("bhqk", sizes, shapes, strict=True)}


@cache
def scores(sizes: tuple[int, ...], high: bool) -> torch.Tensor:
    """[B, H, Q, K]"""
    drawn = torch.randn(sizes, generator=torch.Generator().manual_seed(1)) * 2
    return drawn.double() if high else drawn


def direct(mod: Mod, sizes: tuple[int, ...], score: torch.Tensor | None = None) -> torch.Tensor:
    """[B, H, Q, K]: the function's value, as flex_attention defines it; in float64 throughout if the score is."""
    high = score is not None and score.dtype == torch.float64
    inputs = [i.expand(sizes).flatten() for i in axes(sizes).values()]
    inputs = [score.flatten(), *inputs] if score is not None else inputs
    captured = [NUMBERS.get(name, raised(mod.captured[name], high)) for name in mod.names]
    over_pairs = torch.vmap(mod.function(high), in_dims=(0,) * len(inputs) + (None,) * len(captured))
    with TransformGetItemToIndex():
        return over_pairs(*inputs, *captured).view(sizes)


def traced(mod: Mod) -> Expr:
    captured = [Captured(None if name in INTS else CAPTURED[name], LEAVES[name]) for name in mod.names]
    return narrow(trace(mod.function(), mod.takes_score, captured, CPU))


def captured_value(leaf: Expr) -> Any:
    """What a call gives for a captured leaf: a Python integer, or a tensor, also for a float."""
    name = NAMES[leaf]
    return NUMBERS[name] if name in INTS else CAPTURED[name]


@dataclass(frozen=True)
class Case:
    """score_mod and mask_mod, either of them None, on sizes B, H, Q, K."""

    score_mod: Mod | None
    mask_mod: Mod | None
    sizes: tuple[int, ...]

    @cached_property
    def visible(self) -> torch.Tensor:
        """What the mask_mod leaves visible."""
        return torch.ones(self.sizes, dtype=torch.bool) if self.mask_mod is None else direct(self.mask_mod, self.sizes)

    def brute_force(self, score: torch.Tensor) -> torch.Tensor:
        """[B, H, Q, K]: the modified, masked score."""
        modified = score if self.score_mod is None else direct(self.score_mod, self.sizes, score)
        return torch.where(self.visible, modified, -math.inf)

    @cached_property
    def prepared(self) -> tuple[Program, list[torch.Tensor]]:
        """The program of a plan, and its operands. Raises one of REFUSED."""
        score = ir.SCORE if self.score_mod is None else traced(self.score_mod)
        mask = ir.TRUE if self.mask_mod is None else traced(self.mask_mod)
        program, hoisted = partition(normalize(ir.program(score, mask)), STORED)
        return program, [operand_value(part, captured_value, self.sizes, CPU) for part in hoisted]

    def interpreted(self, score: torch.Tensor) -> torch.Tensor:
        """[B, H, Q, K]: what the reference interpreter makes of the program."""
        program, operands = self.prepared
        leaf = environment(score, axes(self.sizes), dict(enumerate(operands)), INT_VALUES, FLOAT_VALUES)
        high = score.dtype == torch.float64
        modified, visible = (evaluate(root, leaf, high) for root in (program.score, program.mask))
        return torch.where(visible, modified, -math.inf).expand(self.sizes)

    @property
    def mask_class(self) -> str:
        """What the program's mask is made of."""
        program, _ = self.prepared
        form = split(program.mask)
        parts = {"bounds": form.bounds, "biases": form.biases, "residual": form.residual is not TRUE}
        return " and ".join(name for name, part in parts.items() if part) or "no mask"

    def problem(self, program: Program, training: bool, lengths: tuple[int, int]) -> Problem:
        batch, heads = self.sizes[:2]
        query, key = (
            TensorSpec((batch, heads, n, 64), (heads * n * 64, n * 64, 64, 1), torch.bfloat16) for n in lengths
        )
        operands = tuple(TensorSpec.of(t) for t in self.prepared[1])
        forward = Problem(program, FORWARD, query, key, key, out_spec(query, key), operands, 0.125, 0)
        return forward.backward() if training else forward

    def lowerings(self, training: bool) -> Iterator[tuple[str, Problem, Lowering]]:
        """Every lowering that the package might try: of the program, less bounds that always hold, and guarded."""
        program, _ = self.prepared
        lengths = self.sizes[2:]
        less = pruned(program, lengths)
        for variant, name in {guarded(less, lengths): " guarded", less: " pruned", program: ""}.items():
            for strategy, problem, lowering in self._tried(variant, training, lengths):
                yield strategy + name, problem, lowering

    def _tried(
        self, program: Program, training: bool, lengths: tuple[int, int]
    ) -> Iterator[tuple[str, Problem, Lowering]]:
        problem = self.problem(program, training, lengths)
        if refused(problem, program) is not None:
            return
        for strategy in STRATEGIES:
            lowering = strategy.lower(program, training)
            if not isinstance(lowering, Reason):
                yield strategy.name, problem, lowering

    def parts(self) -> Iterator[tuple[str, list[tuple[Box, Problem, Lowering]]]]:
        """The forward as several plans over boxes of its rows and columns, if it can be divided."""
        program, operands = self.prepared
        found = boxes(split(program.mask), self.sizes[2:])
        if found is None or any(n > 1 for t in operands for n in t.shape[2:]):
            return
        for name, these in {"boxes": found, "unshifted boxes": unshifted(found)}.items():
            locals_ = [box.program(program.score) for box in these]
            lengths = [(box.bottom - box.top, box.right - box.left) for box in these]
            tried = [list(self._tried(p, False, n)) for p, n in zip(locals_, lengths, strict=True)]
            if all(tried):
                yield name, [(box, *first[0][1:]) for box, first in zip(these, tried, strict=True)]

    def emulated(
        self, problem: Problem, lowering: Lowering, score: torch.Tensor, grad: Any = None
    ) -> torch.Tensor:
        """[B, H, Q, K]: the modified, masked score, or in training the gradient of the raw score."""
        operands = dict(enumerate(self.prepared[1]))
        return emulated(problem, lowering, score, operands, INT_VALUES, FLOAT_VALUES, grad)

    def emulated_parts(self, parts: list[tuple[Box, Problem, Lowering]], score: torch.Tensor) -> torch.Tensor:
        """[B, H, Q, K]: what the parts write, each pair by one of them at most."""
        whole = torch.full_like(score, -math.inf)
        for box, problem, lowering in parts:
            inner = (..., slice(box.top, box.bottom), slice(box.left, box.right))
            piece = self.emulated(problem, lowering, score[inner])
            assert not bool(((whole[inner] != -math.inf) & (piece != -math.inf)).any()), "parts overlap"
            whole[inner] = torch.where(piece == -math.inf, whole[inner], piece)
        return whole


def round_trips(program: Program) -> bool:
    return parse(text(program)) is program
