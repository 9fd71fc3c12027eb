"""The CUDA kernels of the ops: one look-up of the plan, and one launch.

engine/find_plan.py finds a plan at the first call of a shape. A call without a certified plan runs Inductor's kernel
(inductor.py).
"""

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.engine.find_plan import find_plan
from cudnn_flex_compile.engine.key import Key, backward_key, forward_key
from cudnn_flex_compile.engine.launch.memory import empty
from cudnn_flex_compile.engine.problem import TensorSpec, dense, dense_like, out_spec
from cudnn_flex_compile.engine.repro import warned
from cudnn_flex_compile.engine.state import engine
from cudnn_flex_compile.engine.store.plan_cache import CachedPlan
from cudnn_flex_compile.kernels import block_mask_contract, bound_calls, inductor, tile_lists
from cudnn_flex_compile.kernels.arguments import Arguments
from cudnn_flex_compile.kernels.list_making import Listed
from cudnn_flex_compile.kernels.stock import Given, Stock
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod.saturate import limit_of, saturated
from cudnn_flex_compile.scoremod.text import parse

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
log = logging.getLogger("cudnn_flex_compile")
DISAGREE = Reason(Code.BLOCK_MASK, "its blocks do not agree with its mask_mod")
_warned: set[str] = set()
_plans = engine.plans
_plans.dropped += [bound_calls.forwards.clear, bound_calls.backwards.clear]


def forward(
    query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor], ints: Sequence[int],
    floats: Sequence[Tensor], program: str, scale: float, stats: bool, tiles: Tensor | None = None,
    policy: str = "", stock: Given | None = None, bind: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output in the query's order of strides, and the natural log-sum-exp [B, H, Sq], empty without `stats`.

    With the handle of a list of tiles, the plan runs by this list, which has the BlockMask's blocks in it. Without one,
    a call whose BlockMask disagrees with its mask runs as in stock flex_attention. `bind` has calls like this one run
    bound (bound_calls.py).
    """
    if query.get_device() != torch_private.current_device():
        with torch.cuda.device(query.device):
            return forward(query, key, value, operands, ints, floats, program, scale, stats, tiles, policy, stock)
    listed = None
    if tiles is not None:
        listed = tile_lists.settled(tiles, query, key, value, operands, ints, floats, program, stock)
    elif stock is not None and not block_mask_contract.agrees(stock, query, key, ints, floats):
        given = Arguments(operands, ints, floats, program, scale)
        return _forward_by_blocks(query, key, value, given, stats, policy, Stock.of(*stock))
    call = forward_key(program, query, key, value, operands, scale, stats, listed.mask_heads if listed else 0, policy)
    found = _found(call, listed)
    fitting = _fitting(program, ints, query, key) if ints else ints
    if isinstance(found, Reason) or (fitting is None and listed is None):
        _explain(program, found)
        given = Arguments(operands, ints, floats, program, scale)
        return _fallback_forward(query, key, value, given, stats, _stock_of(stock))
    if found.copied:
        query, key, value = _copied(found, query, key, value)
    out, lse = empty(*found.layouts[0]), empty(*found.layouts[1])
    inputs = _aligned((query, key, value))
    outputs = (out, lse) if stats else (out,)
    try:
        operands = _aligned(operands) if operands and listed is None else operands
        found.plan.run((*inputs, *outputs), operands, fitting or (), floats, listed and listed.tiles)
    except torch.OutOfMemoryError as error:
        _explain(program, _no_workspace(found, error))
        del out, outputs
        given = Arguments(operands, ints, floats, program, scale)
        return _fallback_forward(query, key, value, given, stats, _stock_of(stock))
    _hold_if_captured(found)
    if bind and not (ints or floats):
        _bind(bound_calls.forwards, program, call, found, (query, key, value), operands)
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor,
    operands: Sequence[Tensor], ints: Sequence[int], floats: Sequence[Tensor], program: str, scale: float,
    tiles: Tensor | None = None, policy: str = "", stock: Given | None = None, bind: bool = False,
) -> Gradients:  # fmt: skip
    """dQ, dK, dV, dense in the orders of the strides of query, key and value, and the gradient of the learned operand,
    contiguous, in the query's dtype, empty if there is none.

    A gradient of the (natural) log-sum-exp is given if the loss reads it. With and without it there are two plans.
    """
    if query.get_device() != torch_private.current_device():
        with torch.cuda.device(query.device):
            same = (out, stats, operands, ints, floats, program, scale, tiles, policy, stock)
            return backward(grad_out, grad_lse, query, key, value, *same)
    listed = None
    if tiles is not None:
        listed = tile_lists.settled(tiles, query, key, value, operands, ints, floats, program, stock)
    elif stock is not None and not block_mask_contract.agrees(stock, query, key, ints, floats):
        given = Arguments(operands, ints, floats, program, scale)
        return _backward_by_blocks(grad_out, grad_lse, query, key, value, out, stats, given, policy, Stock.of(*stock))
    heads = listed.mask_heads if listed else 0
    before = forward_key(program, query, key, value, operands, scale, True, heads, policy)
    call = backward_key(before, grad_out, grad_lse is not None)
    found = _found(call, listed)
    fitting = _fitting(program, ints, query, key) if ints else ints
    if isinstance(found, Reason) or (fitting is None and listed is None):
        _explain(program, found)
        given = Arguments(operands, ints, floats, program, scale)
        return _fallback_backward(grad_out, grad_lse, query, key, value, given, _stock_of(stock))
    if found.copied:
        query, key, value, grad_out = _copied(found, query, key, value, grad_out)
    if out.stride() != found.out_stride:  # a hook on saved tensors may have brought it back in another layout
        out, bind = _laid_out(out, found.plan.problem.out), False
    q_layout, k_layout, v_layout, *bias_layout = found.layouts
    dq, dk, dv = empty(*q_layout), empty(*k_layout), empty(*v_layout)
    dbias = empty(*bias_layout[0]) if bias_layout else empty((0,), (1,), query.dtype)
    gradients = (dq, dk, dv, dbias) if bias_layout else (dq, dk, dv)
    of_lse = () if grad_lse is None else (grad_lse.to(torch.float32).contiguous(),)
    inputs = _aligned((query, key, value, out, stats, grad_out, *of_lse))
    try:
        operands = _aligned(operands) if operands and listed is None else operands
        found.plan.run((*inputs, *gradients), operands, fitting or (), floats, listed and listed.tiles)
    except torch.OutOfMemoryError as error:
        _explain(program, _no_workspace(found, error))
        del dq, dk, dv, dbias, gradients
        given = Arguments(operands, ints, floats, program, scale)
        return _fallback_backward(grad_out, grad_lse, query, key, value, given, _stock_of(stock))
    _hold_if_captured(found)
    if bind and not (ints or floats) and all(given is grad_lse for given in of_lse):
        tensors = (query, key, value, out, stats, grad_out, *of_lse)
        _bind(bound_calls.backwards, program, call, found, tensors, operands)
    return dq, dk, dv, dbias


def _found(call: Key, listed: Listed | None) -> CachedPlan | Reason:
    """The plan of a call, if there is the list of tiles that it takes."""
    if listed is not None and isinstance(listed.found, Reason):
        return listed.found
    return _plans.get(call) or find_plan(call)


def _bind(
    calls: bound_calls.Calls, program: str, call: Key, found: CachedPlan, tensors: Sequence[Tensor],
    operands: Sequence[Tensor],
) -> None:  # fmt: skip
    """Has calls that look like one that ran run by its plan, as long as that is in the cache."""
    if bound_calls.has_room(calls, program) and not (found.copied or torch.cuda.is_current_stream_capturing()):
        given = (calls, program, call, tensors, operands, found.plan, found.layouts)
        _plans.lend(call, found, lambda uses: bound_calls.bind(*given, uses))


def _hold_if_captured(found: CachedPlan) -> None:
    """Keeps a plan alive that a CUDA graph captures, whose replays read its kernels and constants."""
    if torch.cuda.is_current_stream_capturing():
        _plans.hold(found)


def _no_workspace(found: CachedPlan, error: torch.OutOfMemoryError) -> Reason:
    """The reason for a call without memory for a workspace. Raises the error while a CUDA graph is being captured,
    because nothing else can be compiled then.
    """
    if torch.cuda.is_current_stream_capturing():
        raise error
    return Reason(Code.MEMORY, f"{found.plan.strategy} has no memory to work in: {str(error)[:120]}")


def _copied(found: CachedPlan, *tensors: Tensor) -> tuple[Tensor, ...]:
    problem = found.plan.problem
    read = (problem.query, problem.key, problem.value, problem.grad)
    return tuple(
        _copy(t, spec) if copy and spec is not None else t
        for t, spec, copy in zip(tensors, read, found.copies, strict=False)
    )


def _aligned(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors, or copies of them: cuDNN reads 16 bytes at a time, and a view may start in between."""
    bits = 0
    for tensor in tensors:
        bits |= tensor.data_ptr()
    if bits & 15 == 0:
        return tensors
    return [t if t.data_ptr() % 16 == 0 else _copy(t, TensorSpec.of(t)) for t in tensors]


def _copy(tensor: Tensor, layout: TensorSpec) -> Tensor:
    """A copy of the tensor in another layout. Entries of an expanded dimension may be one in it."""
    copy = layout.empty(tensor.device)
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in layout.stride)
    copy[once].copy_(tensor[once])
    return copy


def _laid_out(tensor: Tensor, layout: TensorSpec) -> Tensor:
    """The tensor itself if it has this layout (strides of dimensions of size 1 may differ), or else a copy."""
    if tensor.stride() == layout.stride:
        return tensor
    sizes = zip(layout.shape, tensor.stride(), layout.stride, strict=True)
    if all(size == 1 or given == wanted for size, given, wanted in sizes):
        return tensor.as_strided(layout.shape, layout.stride)
    return _copy(tensor, layout)


def _fitting(program: str, ints: Sequence[int], query: Tensor, key: Tensor) -> Sequence[int] | None:
    """The integers in a form that fits into the 32 bits of a plan, or None."""
    limit = _limit(program, 1 << max(query.shape[2], key.shape[2]).bit_length())
    for number in ints:
        if abs(number) > limit:
            parsed = parse(program)
            found = saturated((parsed.score, parsed.mask), ints, limit)
            return found if all(abs(n) <= limit for n in found) else None
    return ints


@functools.lru_cache(1024)
def _limit(program: str, longest: int) -> int:
    parsed = parse(program)
    return limit_of((parsed.score, parsed.mask), longest)


def _explain(program: str, found: CachedPlan | Reason) -> None:
    """Warns once for each program that cuDNN is not used, and why, unless certification has warned already."""
    if program not in _warned:
        _warned.add(program)
        if isinstance(found, Reason) and found.code is Code.CERTIFICATION and warned(program):
            return
        why = found if isinstance(found, Reason) else "what is computed with a captured integer is beyond 32 bits"
        log.warning("cudnn_flex: a call runs on Inductor's flex_attention instead of cuDNN: %s", why)


def _stock_of(given: Given | None) -> Stock | None:
    return None if given is None else Stock.of(*given)


def _forward_by_blocks(
    query: Tensor, key: Tensor, value: Tensor, given: Arguments, stats: bool, policy: str, stock: Stock
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs a call as stock flex_attention does.

    Where the device chooses, the plan runs, too; then one of both has no block to compute.
    """
    if not stock.chosen_by_device:
        _explain(given.program, DISAGREE)
        return _fallback_forward(query, key, value, given, stats, stock)
    out, lse = forward(query, key, value, *given, stats, None, policy)
    other, other_lse = _fallback_forward(query, key, value, given, stats, stock.where_plans_are_wrong())
    return torch.where(stock.guard, out, other), torch.where(stock.guard, lse, other_lse) if stats else lse


def _backward_by_blocks(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor,
    given: Arguments, policy: str, stock: Stock,
) -> Gradients:  # fmt: skip
    tensors = (grad_out, grad_lse, query, key, value)
    if not stock.chosen_by_device:
        return _fallback_backward(*tensors, given, stock)
    planned = backward(*tensors, out, stats, *given, None, policy)
    others = _fallback_backward(*tensors, given, stock.where_plans_are_wrong())
    dq, dk, dv, dbias = (torch.where(stock.guard, *pair) for pair in zip(planned, others, strict=True))
    return dq, dk, dv, dbias


def _fallback_forward(
    query: Tensor, key: Tensor, value: Tensor, given: Arguments, stats: bool, stock: Stock | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # Dynamo compiles again where a tensor no longer requires a gradient, as while a CUDA graph is being recorded.
    query, key, value, *operands = (t.detach() for t in (query, key, value, *given.operands))
    given, stock = given._replace(operands=operands), stock and stock.detached()
    with torch_private.above_autograd(), torch.no_grad():
        out, lse = inductor.forward(query, key, value, given, stock)
    wanted = out_spec(TensorSpec.of(query), TensorSpec.of(value))
    lse = _laid_out(lse, dense(TensorSpec.of(lse))) if stats else lse.new_empty(0)
    return _laid_out(out, wanted), lse


def _fallback_backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, given: Arguments,
    stock: Stock | None,
) -> Gradients:  # fmt: skip
    with torch_private.above_autograd():
        gradients = inductor.backward(grad_out, grad_lse, query, key, value, given, stock)
    of_inputs = zip(gradients, (query, key, value), strict=False)
    dq, dk, dv = (_laid_out(g, dense_like(TensorSpec.of(t))) for g, t in of_inputs)
    if len(gradients) == 3:
        return dq, dk, dv, query.new_empty(0)
    dbias = gradients[3].to(query.dtype)
    return dq, dk, dv, _laid_out(dbias, dense(TensorSpec.of(dbias)))
