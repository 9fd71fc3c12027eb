"""Reasons to keep a call that do not depend on its functions: its outputs, options, tensors and memory.

lower_call.py asks it first, before anything is traced.
"""

import math
from collections.abc import Sequence

import torch
from torch.fx import Node

from cudnn_flex_compile import torch_private
from cudnn_flex_compile.engine.support import wrong_dtypes
from cudnn_flex_compile.passes.read.call import Call, example, hint, is_data, scale_of
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.partition import HALF, Hoisted

MIB = 2**20
DECODING_QUERIES = 16  # with up to so many queries, a call decodes
UNFORCED = {"BACKEND": "AUTO", "FORCE_USE_FLEX_ATTENTION": False}  # options that name a kernel, and values that don't


def unrecorded(call: Call) -> Reason | None:
    """A reason if an argument of the call has no example, as one has none that another pass wrote."""
    given = [call.node, call.query, call.key, call.value, call.scale, *call.captured, *call.blocks, *call.block_sizes]
    unknown = [n for n in given if isinstance(n, Node) and torch_private.example_of(n, None) is None]
    if not unknown:
        return None
    return Reason(Code.TORCH, f"an example of the value of {unknown[0].name}, which nodes of Dynamo's graphs have")


def unsuitable(call: Call) -> Reason | None:
    """A reason that needs no tracing, or None."""
    if torch_private.needed_for_lowering:
        return Reason(Code.TORCH, ", ".join(name.where for name in torch_private.needed_for_lowering))
    tensors = [example(n) for n in (call.query, call.key, call.value)]
    for name, unforced in UNFORCED.items():
        if call.kernel_options.get(name, unforced) != unforced:
            return Reason(Code.FORCED_BACKEND, f"kernel_options have {name}={call.kernel_options[name]!r}")
    if call.mode.inference:
        return Reason(Code.UNSUPPORTED_CALL, "inference mode is entered inside of what is compiled; no_grad may be")
    if call.uses(2):
        return Reason(Code.MAX_SCORES, "the largest score of each row is used")
    if scale_of(call) is None:
        given = "a tensor" if isinstance(example(call.scale), torch.Tensor) else "data"
        return Reason(Code.UNSUPPORTED_CALL, f"the scale is {given}, not a number that is known before the call")
    if _of_data(call):
        return Reason(Code.DATA_DEPENDENT, f"{_of_data(call)} depends on data")
    if tensors[0].device.type not in ("cuda", "cpu"):
        return Reason(Code.DEVICE, f"tensors are on {tensors[0].device}")
    if any(type(t) is not type(tensors[0]) or t.is_nested or torch_private.wraps_tensors(t) for t in tensors):
        types = sorted({type(t).__name__ for t in tensors})
        return Reason(Code.UNSUPPORTED_CALL, f"tensors of different, nested or wrapping types: {', '.join(types)}")
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return Reason(Code.CAPTURING, "this call was compiled while a CUDA graph was captured", lasting=False)
    return None


def unplannable(call: Call, training: bool) -> Reason | None:
    """A reason to keep a call whose kernels are fast, but would be built again for each call."""
    queries, keys = (example(node).shape[2] for node in (call.query, call.key))
    static = isinstance(queries, int), isinstance(keys, int)
    if training or static != (True, False) or queries > DECODING_QUERIES:
        return None
    detail = "a few queries beside keys whose number changes: a plan for each number takes longer than the call"
    return Reason(Code.SLOWER, detail)


def _of_data(call: Call) -> str | None:
    """The name of an argument whose size is unknown before the call runs, such as tokens that a mask picks."""
    for name in ("query", "key", "value"):
        shape = example(getattr(call, name)).shape
        if any(map(is_data, shape)):
            return f"the {name}'s shape {tuple(shape)}"
    for value in map(example, [*call.score_captured, *call.mask_captured, *call.blocks, *call.block_sizes]):
        if isinstance(value, torch.Tensor) and any(map(is_data, value.shape)):
            return f"the shape {tuple(value.shape)} of a tensor that a function or the BlockMask has"
        if is_data(value):
            return f"a number that a function or the BlockMask has, {value},"
    return None


def wrong_dtype(call: Call) -> Reason | None:
    """A reason if the tensors have dtypes that no plan takes. It comes before the question whether plans are faster."""
    detail = wrong_dtypes(*(example(node).dtype for node in (call.query, call.key, call.value)))
    return None if detail is None else Reason(Code.DTYPE, detail)


def over_budget(call: Call, hoisted: Sequence[Hoisted], budget: int) -> Reason | None:
    """A reason if an operand over (q, kv) pairs takes more memory than the option allows."""
    sizes = sizes_of(call)
    for part in hoisted:
        count = math.prod(n for axis, n in zip(ir.AXES, sizes, strict=True) if axis in part.dims)
        gradients = count + _gradient_work(sizes) if part.learned else 0
        mib = (count * part.stored.itemsize + gradients * HALF.itemsize) / MIB
        if {"q", "k"} <= set(part.dims) and mib > budget:
            what = "a bias over (q, kv) pairs" + (", its gradient and the memory to work in" if part.learned else "")
            return Reason(Code.BIAS_BUDGET, f"{what} takes {mib:.0f} MiB, more than bias_budget_mb={budget}")
    return None


def _gradient_work(sizes: tuple[int, int, int, int]) -> int:
    """The number of 16-bit numbers that a plan works on where it computes a bias's gradient: one for each pair of each
    batch entry and head, in tiles of 64 by 128 (1.07 GB at B 2, H 16, S 4096).
    """
    batch, heads, rows, columns = sizes
    return batch * heads * math.ceil(rows / 64) * 64 * math.ceil(columns / 128) * 128


def sizes_of(call: Call) -> tuple[int, int, int, int]:
    """B, Hq, Sq and Skv in the call that is being compiled."""
    (batch, heads, rows), columns = example(call.query).shape[:3], example(call.key).shape[2]
    return hint(batch), hint(heads), hint(rows), hint(columns)
