"""The samples of certification: the heads, query rows and key columns of a problem that are compared.

Rows and columns are the ends, tile edges, the edges of the mask's bounds, those that see the fewest and the most (none,
one, two, all), and some at random. A sample depends on the problem and its mask alone, never on the plan.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cudnn_flex_compile.engine.certify.reference import Sample
from cudnn_flex_compile.engine.problem import Problem
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import Program

SEED = 20240817
TILE = 128
RANDOM, BY_BOUNDS, ALIKE = 16, 16, 2
# The number of pairs of a head that are searched for rows that see few keys.
SEARCHED = 2**21


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """Sampled heads as (batch, head) `pairs`, N, and as [N] each, and the query rows [R] and key columns [C] of each;
    int64.
    """

    pairs: Sequence[tuple[int, int]]
    batches: torch.Tensor
    heads: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    @property
    def names(self) -> list[str]:
        return [f"batch {b}, head {h}" for b, h in self.pairs]


def sample_plan(problem: Problem, sample: Sample, device: torch.device) -> SamplePlan:
    """Chooses the samples for one set of operands, on which the mask may depend. Waits for the device once."""
    batch, heads, _ = problem.lse_shape
    pairs = sorted({(0, 0), (batch - 1, heads - 1), (batch // 2, heads // 2)})
    batches, of_heads = torch.tensor(pairs, device=device).T
    usual = [_usual(n, _constants(problem.program, problem.lengths)) for n in problem.lengths]
    candidates = [
        _candidates(own, n, other) for own, n, other in zip(usual, problem.lengths, problem.lengths[::-1], strict=True)
    ]
    near = [torch.tensor(c, device=device) for c in candidates]
    every = [torch.arange(n, device=device) for n in problem.lengths]
    rows_see = _visible(sample, batches, of_heads, near[0], every[1]).sum(-1)
    columns_seen = _visible(sample, batches, of_heads, every[0], near[1]).sum(-2)
    counts = torch.cat([rows_see, columns_seen], dim=1).tolist()
    chosen: list[torch.Tensor] = []
    for side, (own, found) in enumerate(zip(usual, candidates, strict=True)):
        start = side * len(candidates[0])
        telling = [found[i] for of_pair in counts for i in _telling(of_pair[start : start + len(found)])]
        chosen.append(torch.tensor(sorted({*own, *telling}), device=device))
    return SamplePlan(pairs, batches, of_heads, *chosen)


def _visible(sample: Sample, batches: torch.Tensor, heads: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor):
    ones = torch.ones((len(batches), len(rows), len(columns)), device=rows.device)
    return sample.masked(ones, batches, heads, rows, columns) != -math.inf


def _telling(counts: list[int]) -> list[int]:
    """Positions of some counts of each kind: none, one, two, and the largest."""
    found: list[int] = []
    for wanted in (0, 1, 2, max(counts)):
        found += [i for i, count in enumerate(counts) if count == wanted][:ALIKE]
    return found


def _candidates(usual: list[int], length: int, other: int) -> list[int]:
    """The usual positions, and others at equal distances, as many as SEARCHED allows."""
    count = max(32, SEARCHED // other - len(usual))
    return sorted({*usual, *range(0, length, math.ceil(length / count))})


@functools.cache
def _constants(program: Program, lengths: tuple[int, int]) -> tuple[int, ...]:
    """Positions on either axis to which the mask's constants may move a bound: beside each constant, and beside its
    distance to the ends.
    """
    found: set[int] = set()
    for node in ir.walk(program.mask):
        if node.kind == "const" and node.dtype == ir.I32:
            size = abs(int(node.value or 0))
            found |= {size, size - 1, size + 1, TILE - size % TILE}
            found |= {n - size + step for n in lengths for step in (-1, 0)}
    return tuple(sorted(found))


def _usual(length: int, constants: tuple[int, ...]) -> list[int]:
    edges = [0, 1, 63, 64, TILE - 1, TILE, 255, 256, length // 2, length - 2, length - 1]
    edges += [length // TILE * TILE - 1, length // TILE * TILE]
    bounds = [c for c in constants if 0 <= c < length]
    bounds = bounds[:: max(1, math.ceil(len(bounds) / BY_BOUNDS))]
    random = torch.randint(length, (RANDOM,), generator=torch.Generator().manual_seed(SEED)).tolist()
    return sorted({i for i in (*edges, *bounds, *random) if 0 <= i < length})
