"""Slices of a problem: copies of some rows and columns of some heads, from which expected values are computed.

A regime's data is gone once the next one is drawn, and for small problems the host takes longer to enqueue an
evaluation than the device takes to run it. So slices of several regimes are kept, and evaluated as one, as long as
they are small (ENTRIES_AT_ONCE). expected.py computes with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cudnn_flex_compile.engine.certify.regimes import Tensors
from cudnn_flex_compile.engine.certify.samples import SamplePlan
from cudnn_flex_compile.engine.problem import BACKWARD, Problem, TensorSpec

# Elements of one float64 tensor of queries (128 MiB), which limit how many heads of a regime are computed at a time.
PAIRS_AT_ONCE = 2**24
# Bytes that the regimes computed together may take. One regime of a large problem may take more.
ENTRIES_AT_ONCE = 3 * 2**27
# The number of float64 tensors of pairs, and of rows and columns, at the moment that takes most memory.
OF_PAIRS, OF_SIDES = 12, 3


@dataclass(frozen=True, slots=True)
class Slice:
    """Some rows and columns of some heads that are computed at a time.

    Attributes:
        where: batches [P], heads [P], rows [R], columns [C]. The query heads of one kv head follow each other.
        of_rows, of_columns: indices into tensors with query heads or with kv heads: [P, R] or [N, C] entries, where P
            is a multiple of N.
        bytes: the memory that one regime takes.
    """

    where: tuple[torch.Tensor, ...]
    of_rows: tuple[torch.Tensor, ...]
    of_columns: tuple[torch.Tensor, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class SliceData:
    """Copies of the data of some regimes in one slice, one regime after the other.

    N and P are the slice's, times the number of regimes.

    Attributes:
        regimes: the number of regimes.
        where: the slice's `where`.
        query: [N, S, D], where S = P / N * R: the rows of one head after those of another.
        key, value: [N, C, D], [N, C, Dv].
        of_rows: for a backward, grad and out [N, S, Dv], lse [N, S, 1], and the gradient of the lse, if there is one.
    """

    regimes: int
    where: tuple[torch.Tensor, ...]
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    of_rows: tuple[torch.Tensor, ...]


def slice_data(problem: Problem, t: Tensors, piece: Slice) -> SliceData:
    """One regime's data, in its own dtypes."""
    of_rows = [t.query]
    if problem.direction == BACKWARD:
        of_rows += [t.grad, t.out, t.stats] + [t.grad_lse] * problem.lse_gradient
    key, value = t.key[piece.of_columns], t.value[piece.of_columns]
    query, *rest = (x[piece.of_rows].reshape(len(key), -1, x.shape[3]) for x in of_rows)
    return SliceData(1, piece.where, query, key, value, tuple(rest))


def concatenated(given: Sequence[SliceData]) -> SliceData:
    """The data of several regimes in one slice, as one."""
    count, (batches, heads, *sides) = len(given), given[0].where
    if count == 1:
        return given[0]
    of_all = zip(*((g.query, g.key, g.value, *g.of_rows) for g in given), strict=True)
    query, key, value, *rest = map(torch.cat, of_all)
    return SliceData(count, (batches.repeat(count), heads.repeat(count), *sides), query, key, value, tuple(rest))


def regimes_at_once(slices: Sequence[Slice]) -> int:
    return 1 if len(slices) > 1 else max(1, ENTRIES_AT_ONCE // slices[0].bytes)


def slice_of_rows(problem: Problem, where: SamplePlan) -> Slice:
    """The sampled query rows, and all key columns."""
    return _slice_of(problem, where.batches, where.heads, where.rows, None)


def slices_of_columns(problem: Problem, where: SamplePlan) -> list[Slice]:
    """The sampled key columns, and all rows of all query heads of the sampled kv heads, some heads at a time."""
    group, size = group_of(problem), problem.query.shape[2] * max(problem.query.shape[3], problem.value.shape[3])
    first, slices = where.heads // group * group, list[Slice]()
    for members in torch.arange(group, device=first.device).split(max(1, PAIRS_AT_ONCE // (size * len(first)))):
        batches = where.batches[:, None].expand(-1, len(members)).flatten()
        heads = (first[:, None] + members).flatten()
        slices.append(_slice_of(problem, batches, heads, None, where.columns, len(members)))
    return slices


def slices_of_bias(problem: Problem, where: SamplePlan, spec: TensorSpec, transposed: bool) -> list[Slice]:
    """The sampled rows, or if transposed columns, of all heads [M * N] that share entries of an operand with the N
    sampled ones, some heads at a time.
    """
    heads, sampled = problem.lse_shape[1], where.columns if transposed else where.rows
    size = len(where.heads) * len(sampled) * problem.lengths[not transposed]
    first, slices = where.batches * (spec.shape[0] > 1) * heads + where.heads * (spec.shape[1] > 1), list[Slice]()
    for some in sharers_of(problem, spec).to(first.device).split(max(1, PAIRS_AT_ONCE // (4 * size))):
        members = (first + some[:, None]).flatten()
        sides = (None, sampled) if transposed else (sampled, None)
        slices.append(_slice_of(problem, members // heads, members % heads, *sides))
    return slices


def sharers_of(problem: Problem, spec: TensorSpec) -> torch.Tensor:
    """The batch entries and heads that share an entry of an operand, as differences to the first of them, [M]."""
    batch, heads, _ = problem.lse_shape
    shared = (batch if spec.shape[0] == 1 else 1, heads if spec.shape[1] == 1 else 1)
    of_batch, of_head = (torch.arange(n) for n in shared)
    return (of_batch[:, None] * heads + of_head).flatten()


def group_of(problem: Problem) -> int:
    """The number of query heads for each kv head."""
    return problem.query.shape[1] // problem.key.shape[1]


def _slice_of(
    problem: Problem, batches: torch.Tensor, heads: torch.Tensor, rows: torch.Tensor | None,
    columns: torch.Tensor | None, concatenated: int = 1,
) -> Slice:  # fmt: skip
    """The slice of these rows and columns, or all of them; `group` heads after each other share a kv head."""
    kv = batches[::concatenated], heads[::concatenated] // group_of(problem)
    of_rows, of_columns = (
        (b, h) if near is None else (b[:, None], h[:, None], near)
        for b, h, near in ((batches, heads, rows), (*kv, columns))
    )
    every = [
        torch.arange(n, device=batches.device) if near is None else near
        for n, near in zip(problem.lengths, (rows, columns), strict=True)
    ]
    dim, (r, c) = max(problem.query.shape[3], problem.value.shape[3]), map(len, every)
    count = OF_PAIRS * len(batches) * r * c + OF_SIDES * (len(batches) * r + len(kv[0]) * c) * dim
    return Slice((batches, heads, *every), of_rows, of_columns, 8 * count)
