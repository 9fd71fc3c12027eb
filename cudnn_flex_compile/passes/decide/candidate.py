"""`Candidate` is a call with the program that would run. `plan_or_reason` finds its certified plans on a GPU, and
elsewhere checks that cuDNN has forms for the program.

lower_call.py makes candidates; passes/write rewrites the graph by them.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.fx import Node

from cudnn_flex_compile.config import policy_from
from cudnn_flex_compile.engine.certify.reference import CapturedValue, SubgraphReference
from cudnn_flex_compile.engine.graph.strategies import STRATEGIES
from cudnn_flex_compile.engine.key import Key, Meta, backward_key, by_list, forward_key, problem_of
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD, Error, Problem, TensorSpec, dense
from cudnn_flex_compile.engine.support import refused
from cudnn_flex_compile.engine.tiles.tile_list import NAME as TILE_LISTS
from cudnn_flex_compile.passes.decide.key_compaction import COUNTS, Compact, counts_of, order_of, slots_of
from cudnn_flex_compile.passes.read.call import Call, example, hint, scale_of
from cudnn_flex_compile.passes.read.captures import Captures, indexing
from cudnn_flex_compile.passes.write.block_mask_guards import MaskProgram
from cudnn_flex_compile.passes.write.operands import operand_value
from cudnn_flex_compile.reasons import Code, Reason, most_telling
from cudnn_flex_compile.scoremod.aten import fake_mode, joint_graph, plain, value_graph, without_sums
from cudnn_flex_compile.scoremod.dots import Dot
from cudnn_flex_compile.scoremod.ir import AXES, Expr, Program
from cudnn_flex_compile.scoremod.partition import Hoisted
from cudnn_flex_compile.scoremod.ranges import VALUE_LIMIT
from cudnn_flex_compile.scoremod.text import text
from cudnn_flex_compile.scoremod.trace import Captured, stand_ins

if TYPE_CHECKING:
    from cudnn_flex_compile.engine.store.plan_cache import CachedPlan


@dataclass(frozen=True, slots=True)
class Candidate:
    """A call with its program.

    Attributes:
        hoisted: the expressions of its operands.
        captures: its captured inputs.
        training: whether a gradient may be asked for.
        real: the graph's inputs, by placeholder.
        policy: the text of the policy (config.Policy).
        compact: the program over permuted keys that runs in place of `program`, if there is one.
        fingerprint: the text of the call's functions (passes/read/programs.py).
        tiled: the directions that run by a list of the mask's tiles (passes/write/tile_lists.py).
        mask_heads: the number of heads for which there is a list: 1 if all share it.
        shown: the mask of that list, over captures.
        dots: the dots of captured rows that are part of the call's raw scores (passes/write/longer_heads.py).
    """

    call: Call
    program: Program
    hoisted: tuple[Hoisted, ...]
    captures: Captures
    training: bool
    real: dict[Node, Any]
    policy: str
    compact: Compact | None = None
    fingerprint: str | None = None
    tiled: tuple[str, ...] = ()
    mask_heads: int = 0
    shown: MaskProgram | None = None
    dots: tuple[Dot, ...] = ()

    @property
    def lse_gradient(self) -> bool:
        """Whether a gradient of the log-sum-exp may be asked for, too."""
        return self.training and self.call.uses(1) and self.call.differentiates(1)

    @property
    def directions(self) -> tuple[str, ...]:
        """The directions that may run."""
        return (FORWARD, BACKWARD) if self.training else (FORWARD,)

    @property
    def running(self) -> tuple[Program, tuple[Hoisted, ...]]:
        """The program of the plans, and its operands."""
        return (self.program, self.hoisted) if self.compact is None else (self.compact.program, self.compact.hoisted)


class Lowered(NamedTuple):
    """strategies: those of forward and backward, or of the forward. errors: those that certification measured."""

    strategies: tuple[str, ...]
    errors: tuple[Error, ...] = ()


def plan_or_reason(candidate: Candidate) -> Lowered | Reason:
    """The way in which a call runs, or the reason why it is kept."""
    device = example(candidate.call.query).device
    call = forward_call(candidate, candidate.running, device)
    problem = problem_of(call)
    program, on_cpu = candidate.running[0], device.type != "cuda"
    asked = problem
    if candidate.training:
        tiled = candidate.mask_heads if BACKWARD in candidate.tiled else 0
        asked = replace(problem.backward(candidate.lse_gradient), tiled=tiled)
    reason = refused(asked, program, on_cpu)
    if reason is not None:
        return reason
    if not on_cpu:
        return _certified(candidate, call, problem)
    if candidate.tiled == candidate.directions:
        return Lowered((TILE_LISTS,))
    reasons: list[Reason] = []
    forced = policy_from(candidate.policy).strategy
    for strategy in STRATEGIES:
        if forced not in ("", "parts", strategy.name):
            continue
        lowering = strategy.lower(program, candidate.training)
        if not isinstance(lowering, Reason):
            names = [TILE_LISTS if way in candidate.tiled else strategy.name for way in candidate.directions]
            return Lowered(tuple(names) if candidate.tiled else (strategy.name,))
        reasons.append(lowering)
    return most_telling(reasons, forced)


def _certified(candidate: Candidate, call: Key, problem: Problem) -> Lowered | Reason:
    from cudnn_flex_compile.engine.find_plan import find_plan
    from cudnn_flex_compile.engine.store.plan_cache import CachedPlan

    asked = functools.cache(lambda: _reference(candidate)), candidate.fingerprint
    found = find_plan(call, *asked)
    if isinstance(found, Reason):
        return found
    if not candidate.training:
        return _accepted(found)
    tiled = candidate.mask_heads if BACKWARD in candidate.tiled else 0
    backward = find_plan(backward_call(call, tiled), *asked)
    # The loss decides which of both runs, maybe another one at each step.
    if isinstance(backward, CachedPlan) and candidate.lse_gradient:
        backward = find_plan(backward_call(call, tiled, lse_gradient=True), *asked)
        if isinstance(backward, Reason):
            return Reason(Code.LSE_GRADIENT, f"with a gradient of the LSE: {backward}", backward.lasting)
    return backward if isinstance(backward, Reason) else _accepted(found, backward)


def _accepted(*found: "CachedPlan") -> Lowered:
    errors = tuple(error for ready in found for error in ready.plan.errors)
    return Lowered(tuple(ready.plan.strategy for ready in found), errors)


def backward_call(forward: Key, tiled: int = 0, lse_gradient: bool = False) -> Key:
    """The key of a forward call's backward, by a list or not, for a gradient that is laid out like the output."""
    problem = problem_of(forward)
    return backward_key(by_list(forward, tiled), Meta(problem.out, torch.device("cuda", problem.device)), lse_gradient)


def forward_call(candidate: Candidate, running: tuple[Program, tuple[Hoisted, ...]], device: torch.device) -> Key:
    """The key of the call with this program and these operands: those of the plans, or the user's own."""
    call = candidate.call
    query, *given = (_spec(example(n)) for n in (call.query, call.key, call.value))
    key, value = (_with_batch(spec, query.shape[0]) for spec in given)
    sizes = (*query.shape[:3], key.shape[2])
    program, hoisted = running
    if candidate.compact is not None and running == candidate.running:  # the op gets permuted copies
        key, value = dense(key), dense(value)
    operands = [Meta(_operand_spec(h, sizes), device) for h in hoisted]
    stats = candidate.training or call.uses(1)
    tiled = candidate.mask_heads if FORWARD in candidate.tiled else 0
    return forward_key(
        text(program), Meta(query, device), Meta(key, device), Meta(value, device), operands,
        scale=scale_of(call) or 0.0, stats=stats, tiled=tiled, policy=candidate.policy,
    )  # fmt: skip


def _with_batch(spec: TensorSpec, batch: int) -> TensorSpec:
    """Keys and values of batch 1 serve queries of any batch."""
    if spec.shape[0] == batch:
        return spec
    return TensorSpec((batch, *spec.shape[1:]), (0, *spec.stride[1:]), spec.dtype)


def _spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(_hints(tensor.shape), _hints(tensor.stride()), tensor.dtype)


def _hints(sizes: Sequence[Any]) -> tuple[int, ...]:
    return tuple(hint(n) for n in sizes)


def _operand_spec(hoisted: Hoisted, sizes: tuple[int, ...]) -> TensorSpec:
    shape = tuple(n if axis in hoisted.dims else 1 for axis, n in zip(AXES, sizes, strict=True))
    stride = tuple(torch.empty(shape, device="meta").stride())
    return TensorSpec(shape, stride, hoisted.stored)


def _reference(candidate: Candidate) -> SubgraphReference:
    leaves = list(candidate.captures.nodes)
    # Integers that are indices stay within every captured tensor; others, such as lengths, may be up to the length.
    inside = max(min((n for t in leaves for n in _shape(candidate, t)), default=2) - 1, 0)
    indexed, length = indexing(candidate.call), hint(example(candidate.call.key).shape[2])
    captured = tuple(
        _captured(candidate, leaf, *((inside, True) if candidate.captures.nodes[leaf] in indexed else (length, False)))
        for leaf in leaves
    )

    def operands(
        values: Sequence[Any], sizes: tuple[int, int, int, int], device: torch.device
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        by_leaf = dict(zip(leaves, values, strict=True))
        order = None
        if candidate.compact is not None:
            bias = operand_value(candidate.compact.columns, by_leaf.__getitem__, sizes, device)
            span = torch.arange(sizes[3], device=device)
            by_leaf[COUNTS] = counts_of(bias)
            order = order_of(slots_of(bias, by_leaf[COUNTS], span), span)
        return [operand_value(h, by_leaf.__getitem__, sizes, device) for h in candidate.running[1]], order

    return SubgraphReference(
        **_functions(candidate),
        score_captured=tuple(leaves.index(c.leaf) for c in candidate.captures.of_score),
        mask_captured=tuple(leaves.index(c.leaf) for c in candidate.captures.of_mask),
        captured=captured,
        operands=operands,
        ints=tuple(leaves.index(leaf) for leaf in candidate.captures.ints),
        floats=tuple(leaves.index(leaf) for leaf in candidate.captures.floats),
        fingerprint=candidate.fingerprint,
        source=candidate.call.source,
    )


def _functions(candidate: Candidate) -> dict[str, Any]:
    """The user's functions as ATen graphs, because vmap takes no autograd.Function, for one.

    They are traced here, in the thread that compiles: the thread of a certification may not wait for autograd's.
    """
    call, captures = candidate.call, candidate.captures
    device, leaves = example(call.query).device, list(captures.nodes)
    score_mod, mask_mod = plain(call.score_mod), plain(call.mask_mod)
    with fake_mode():
        made_up = stand_ins(True, captures.of_score, device, candidate.training)
        of_score = _numbered(candidate, captures.of_score, made_up)
        of_mask = _numbered(candidate, captures.of_mask, stand_ins(False, captures.of_mask, device, False))
        if candidate.dots:  # the raw score has them
            score_mod = without_sums(value_graph(score_mod, of_score))
        start = len(of_score) - len(captures.of_score)
        places = [start + i for i, c in enumerate(captures.of_score) if c.learned]
        learned = [c for c in captures.of_score if c.learned]
        return {
            "score_mod": value_graph(score_mod, of_score),
            "mask_mod": value_graph(mask_mod, of_mask),
            "joint": joint_graph(score_mod, of_score, places) if candidate.training else None,
            "learned": tuple(leaves.index(c.leaf) for c in learned),
        }


def _numbered(candidate: Candidate, captured: Sequence[Captured], inputs: list[Any]) -> list[Any]:
    """The inputs with the numbers of the call that is being compiled in place of symbolic integers."""
    nodes = candidate.captures.nodes
    numbers = [_hints([example(nodes[c.leaf])])[0] if c.tensor is None else None for c in captured]
    start = len(inputs) - len(captured)
    return inputs[:start] + [t if n is None else n for t, n in zip(inputs[start:], numbers, strict=True)]


def _shape(candidate: Candidate, leaf: Expr) -> tuple[int, ...]:
    tensor = example(candidate.captures.nodes[leaf])
    return _hints(tensor.shape) if isinstance(tensor, torch.Tensor) else ()


def _captured(candidate: Candidate, leaf: Expr, limit: int, index: bool) -> CapturedValue:
    node = candidate.captures.nodes[leaf]
    value = example(node)
    if not isinstance(value, torch.Tensor):
        return CapturedValue(None, number=max(-VALUE_LIMIT, min(_hints([value])[0], VALUE_LIMIT)))  # as plans take it
    real = candidate.real.get(node)
    return CapturedValue(_spec(value), scalar=leaf.kind == "scalar", real=real, limit=limit, index=index)
