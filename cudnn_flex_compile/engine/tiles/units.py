"""A `Unit` is the kernels that are compiled together: those that make lists, or those that read them, by direction.

ahead.py has units compiled, each in a process of its own.
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple

from cudnn_flex_compile.engine.problem import BACKWARD, Problem, TensorSpec
from cudnn_flex_compile.engine.tiles.tile_list import Geometry, geometry_of
from cudnn_flex_compile.scoremod import ir

STAGES, READERS = "stages", "readers"  # the parts of a direction


class Unit(NamedTuple):
    """A part of a direction, and the kind of call, on which the kernels depend: no lengths, and no program."""

    part: str
    direction: str
    kind: tuple[Hashable, ...]


def stages(geometry: Geometry, direction: str) -> Unit:
    """The stages that make a direction's part of a list."""
    g = geometry
    return Unit(STAGES, direction, (g.dtype, g.dim, g.value_dim, g.heads, g.kv_heads, g.mask_heads))


def readers(problem: Problem) -> Unit:
    """The kernels that run a problem. Those that take a gradient of the log-sum-exp are of one unit with the others."""
    g, backward = geometry_of(problem, training=False), problem.direction == BACKWARD
    specs = (problem.query, problem.key, problem.value, problem.out, problem.grad, *(problem.gradients or ()))
    how = problem.deterministic if backward else problem.stats
    return Unit(READERS, problem.direction, (*stages(g, problem.direction).kind, how, *map(_broadcast, specs)))


def _broadcast(spec: TensorSpec | None) -> tuple[bool, ...] | None:
    """The dimensions of stride 0, which kernels are compiled for."""
    return None if spec is None else tuple(stride == 0 for stride in spec.stride)


def units_of(problems: Sequence[Problem]) -> dict[Unit, list[Problem]]:
    """The units of some problems, each with the problems that have it compiled. These have the plainest program, for
    kernels depend on none.
    """
    found: dict[Unit, list[Problem]] = {}
    for problem in problems:
        g = geometry_of(problem, training=problem.direction == BACKWARD)
        plain = replace(problem, program=ir.program(), operands=(), device=0, tiled=g.mask_heads)
        found.setdefault(stages(g, problem.direction), [plain])
        found.setdefault(readers(problem), []).append(plain)
    return found
