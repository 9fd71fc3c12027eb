"""Runs one problem as several plans over disjoint boxes of its pairs.

scoremod/masks/boxes.py finds the boxes; this file decides by their costs, and runs a plan for each. The forward merges
the parts by their log-sum-exps. In the backward every part gets the whole output and log-sum-exp, with which its
weights and gradients are those of the whole row: the sums over parts are exact.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cudnn_flex_compile.engine.plans.merge import merge
from cudnn_flex_compile.engine.plans.plan import AddressPlan, Attempt, Plan, Record
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, Problem, TensorSpec, dense, output_specs
from cudnn_flex_compile.engine.tiles.tile_list import TileList
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import Program
from cudnn_flex_compile.scoremod.masks.boxes import Box, boxes, in_boxes, pruned, unshifted
from cudnn_flex_compile.scoremod.masks.form import MaskForm, split

# The cost of a further plan for each query row, in pairs: launches, merging, and reading and writing of the row. It was
# measured with 10 keys (cudnn-flex bench --mods "sink tokens + small window" --mode reduce-overhead --lower always).
ROW_COST = 700
WORTH = 0.85

Interval = tuple[int, int]


def divided(program: Program, lengths: tuple[int, int], direction: str) -> list[Box] | None:
    """The boxes of a program that runs faster as several plans than as one, or None.

    Programs with operands along q or kv are not divided: every part would need its own copy of these.
    """
    form = split(program.mask)
    operands = [n for n in ir.walk(program.score, program.mask) if n.kind == "operand"]
    found = None if any(set(n.dims) & set("qk") for n in operands) else boxes(form, lengths)
    if found is None:
        return None
    found = unshifted(found) if direction == BACKWARD else found
    return found if _cost(found) < WORTH * _whole_cost(form, lengths, direction) else None


def cost(program: Program, lengths: tuple[int, int], direction: str) -> int:
    """The number of pairs that the plans of a program compute, approximately, without the tiles that they skip."""
    found = divided(program, lengths, direction)
    return _cost(found) if found else _whole_cost(split(program.mask), lengths, direction)


def _cost(found: Sequence[Box]) -> int:
    return sum(box.pairs() for box in found) + ROW_COST * sum(box.bottom - box.top for box in found[1:])


def _whole_cost(form: MaskForm, lengths: tuple[int, int], direction: str) -> int:
    """The pairs that one plan computes: the backward skips no tiles for a shifted diagonal."""
    whole = Box(0, lengths[0], 0, lengths[1])
    for bound in form.bounds if form.skips_tiles else ():
        shifted = bound.at_most and bound.constant != 0 and direction == BACKWARD
        if in_boxes(bound) and bound.diagonal and not shifted:
            whole = whole.with_bound(bound)
    return whole.tight().pairs()


@dataclass(frozen=True, slots=True)
class BoxPart:
    """The plan of one box. rows_own, columns_own: whether no earlier part writes the same ones, so that it writes in
    place.
    """

    box: Box
    plan: AddressPlan
    rows_own: bool
    columns_own: bool


class BoxPlan(Plan):
    """Several plans that behave as one."""

    KIND = "boxes"
    __slots__ = ("_bare_columns", "_bare_rows", "_parts")

    def __init__(self, problem: Problem, parts: Sequence[BoxPart]) -> None:
        super().__init__(problem, f"parts ({', '.join(part.plan.strategy for part in parts)})")
        self._parts = tuple(parts)
        own = [[(p.box.top, p.box.bottom) for p in parts if p.rows_own]]
        own.append([(p.box.left, p.box.right) for p in parts if p.columns_own])
        self._bare_rows, self._bare_columns = map(_gaps, own, problem.lengths)

    @classmethod
    def attempts(cls, problem: Problem, every: Callable[[Problem], list[Attempt]]) -> list[Attempt]:
        from cudnn_flex_compile.engine.plans.graph_plan import first_built

        program, found = _divided(problem)
        if not found or problem.tiled or problem.lse_gradient:
            return []
        return [Attempt(functools.partial(assemble_boxes, problem, program, found, first_built))]

    @property
    def parts(self) -> tuple[Plan, ...]:
        return tuple(part.plan for part in self._parts)

    @classmethod
    def from_record(cls, problem: Problem, record: Record, restore: Callable[[Problem, Record], Plan]) -> Plan:
        (program, found), records = _divided(problem), iter(record.parts)
        if len(found) != len(record.parts):
            raise ValueError(f"it has {len(record.parts)} parts, {len(found)} are wanted")

        def build(_: Program, part: Problem) -> AddressPlan:
            plan = restore(part, next(records))
            if not isinstance(plan, AddressPlan):
                raise ValueError(f"a part is a plan that takes no addresses: {plan.strategy}")
            return plan

        whole = assemble_boxes(problem, program, found, build)
        if isinstance(whole, Reason):
            raise ValueError(str(whole))
        return whole

    def run(
        self, tensors: Sequence[Tensor], operands: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor],
        tiles: TileList | None = None,
    ) -> None:  # fmt: skip
        if self.problem.direction == FORWARD:
            self._forward(*tensors, rest=(operands, ints, floats))
        else:
            self._backward(*tensors, rest=(operands, ints, floats))

    def _forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
        stats: torch.Tensor | None = None, *, rest: tuple[Any, ...],
    ) -> None:  # fmt: skip
        lse = _stats_like(query) if stats is None else stats.view(*query.shape[:3], 1)
        for top, bottom in self._bare_rows:
            out[:, :, top:bottom].zero_()
            lse[:, :, top:bottom].fill_(float("-inf"))
        for part in self._parts:
            box = part.box
            count = box.bottom - box.top
            inputs = [_at(query, box.top), _at(key, box.left), _at(value, box.left)]
            if part.rows_own and count == query.shape[2]:
                part.plan.run_at([*inputs, _at(out, 0), _at(lse, 0)], *rest)
                continue
            here, here_lse = out.narrow(2, box.top, count), lse.narrow(2, box.top, count)
            extra_lse = torch.empty((*query.shape[:2], count, 1), dtype=torch.float32, device=query.device)
            if part.rows_own:
                part.plan.run_at([*inputs, _at(here, 0), _at(extra_lse, 0)], *rest)
                here_lse.copy_(extra_lse)
                continue
            extra = part.plan.outputs[0].empty(out.device)
            part.plan.run_at([*inputs, _at(extra, 0), _at(extra_lse, 0)], *rest)
            merge(here, here_lse, extra, extra_lse)

    def _backward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, stats: torch.Tensor,
        grad: torch.Tensor, *gradients: torch.Tensor, rest: tuple[Any, ...],
    ) -> None:  # fmt: skip
        lse = stats.view(*query.shape[:3], 1)
        bare = (self._bare_rows, self._bare_columns, self._bare_columns)
        for gradient, gaps in zip(gradients, bare, strict=True):
            for start, end in gaps:
                gradient[:, :, start:end].zero_()
        for part in self._parts:
            box = part.box
            rows, columns = (box.top, box.bottom - box.top), (box.left, box.right - box.left)
            near = lse if rows[1] == lse.shape[2] else lse.narrow(2, *rows).contiguous()
            addresses = [_at(query, box.top), _at(key, box.left), _at(value, box.left), _at(out, box.top)]
            addresses += [_at(near, 0), _at(grad, box.top)]
            added: list[tuple[torch.Tensor, torch.Tensor]] = []
            for gradient, place, spec in zip(gradients, (rows, columns, columns), part.plan.outputs, strict=True):
                if part.rows_own if place is rows else part.columns_own:
                    addresses.append(_at(gradient, place[0]))
                    continue
                extra = spec.empty(gradient.device)
                addresses.append(_at(extra, 0))
                added.append((gradient.narrow(2, *place), extra))
            part.plan.run_at(addresses, *rest)
            for gradient, extra in added:
                gradient.add_(extra)


def _divided(problem: Problem) -> tuple[Program, list[Box]]:
    """The program without bounds that hide nothing at these lengths, and its boxes; none where one plan is as fast."""
    program = pruned(problem.program, problem.lengths)
    return program, divided(program, problem.lengths, problem.direction) or []


def _at(tensor: torch.Tensor, row: int) -> int:
    """The address of tensor[:, :, row:], without the cost of a view."""
    return tensor.data_ptr() + row * tensor.stride(2) * tensor.element_size()


def _stats_like(query: torch.Tensor) -> torch.Tensor:
    return torch.empty((*query.shape[:3], 1), dtype=torch.float32, device=query.device)


def _gaps(covered: list[Interval], length: int) -> list[Interval]:
    """The intervals of [0, length) that are not covered."""
    gaps: list[Interval] = []
    start = 0
    for low, high in sorted(covered):
        if low > start:
            gaps.append((start, low))
        start = max(start, high)
    return [*gaps, (start, length)] if start < length else gaps


def assemble_boxes(
    problem: Problem,
    program: Program,
    found: Sequence[Box],
    build: Callable[[Program, Problem], AddressPlan | Reason],
) -> BoxPlan | Reason:
    """Builds a plan for each box.

    Args:
        build: builds a plan for a program and a problem.
    """
    outputs = output_specs(problem)
    parts: list[BoxPart] = []
    for box in found:
        rows_own = all(p.box.bottom <= box.top or box.bottom <= p.box.top for p in parts)
        columns_own = all(p.box.right <= box.left or box.right <= p.box.left for p in parts)
        local = box.program(program.score)
        plan = build(local, _cut(problem, local, box, outputs, rows_own, columns_own))
        if isinstance(plan, Reason):
            return plan
        parts.append(BoxPart(box, plan, rows_own, columns_own))
    return BoxPlan(problem, parts)


def _cut(
    problem: Problem, local: Program, box: Box, outputs: tuple[TensorSpec, ...], rows_own: bool, columns_own: bool
) -> Problem:
    """The problem of one box, on views of the whole problem's tensors."""
    rows, columns = box.bottom - box.top, box.right - box.left
    near = {name: _resized(getattr(problem, name), rows) for name in ("query", "out")}
    far = {name: _resized(getattr(problem, name), columns) for name in ("key", "value")}
    common: dict[str, Any] = {**near, **far, "program": local, "stats": True}
    if problem.direction == FORWARD:
        out = near["out"] if rows_own else dense(near["out"])
        return replace(problem, **{**common, "out": out})
    own = (rows_own, columns_own, columns_own)
    sizes = (rows, columns, columns)
    cut = [_resized(s, n) for s, n in zip(outputs, sizes, strict=True)]
    layouts = [s if mine else dense(s) for s, mine in zip(cut, own, strict=True)]
    grad = None if problem.grad is None else _resized(problem.grad, rows)
    return replace(problem, **common, grad=grad, gradients=tuple(layouts))


def _resized(spec: TensorSpec, length: int) -> TensorSpec:
    return TensorSpec((*spec.shape[:2], length, spec.shape[3]), spec.stride, spec.dtype)
