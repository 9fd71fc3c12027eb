"""Which calls stock flex_attention runs faster, as measured.

Knows nothing of numbers' correctness. Each number states the command that shows it.
"""

from collections.abc import Callable, Sequence

import torch
from torch.fx import Node

from cudnn_flex_compile.engine.parts import cost, divided
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.kernels.block_mask import listed
from cudnn_flex_compile.passes.find import Call, example, hint
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import TRUE, Program
from cudnn_flex_compile.scoremod.masks.boxes import pruned
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.partition import Hoisted

# A (q, kv) pair costs cuDNN this share of what it costs Inductor's kernel. cuDNN skips only what bands rule out,
# Inductor all blocks that the BlockMask omits.
# (cudnn-flex bench --mods causal prefix-LM documents --mode reduce-overhead --lower always)
PAIR_COST = 0.75
# What hiding pairs by a bias costs. (cudnn-flex bench --mods "dilated window" documents --lower always)
BIAS_COST = 1.8
# Several plans in the forward keep the host busy: as called, sinks + window take 1.11 times as long as Inductor's
# kernel, prefix-LM 0.95 times, where by their pairs it were 0.94 and 0.76 times.
# (cudnn-flex bench --mods "sink tokens + window" prefix-LM --lower always)
PARTS_COST = 1.15
# A score's own bias over pairs: Inductor gathers it faster, but for float32 in the forward.
# (cudnn-flex bench --mods "relative table" "bias tensor" --lower always)
FORWARD_ITEMSIZE = 4
BACKWARD_WEIGHT = 2.7  # of a pair in the backward, where it is 1 in the forward
# Interval kernels take this share less than Inductor's, whose rate is in FLOP a millisecond: at B 2, H 16, S 4096, 16
# documents 0.28 ms by themselves where Inductor's take 0.53 as called, forward and backward, on one H200. What finding
# the intervals and listing the tiles takes a step, in milliseconds, is an upper estimate, which all calls with one mask
# share; the share of blocks of a BlockMask that is not at hand a guess. (python3 -m tests.gpu.documents_time)
INTERVALS_GAIN, INDUCTOR_RATE, INTERVALS_SETUP = 0.45, 250e9, 0.5
BACKWARD_TIME = 3.0  # of Inductor's backward, where its forward is 1
GUESSED_SHARE = 0.1
# Its plans are certified like all others, but nobody has measured them. (python3 -m tests.gpu.lse_time will)
UNMEASURED = Reason(Code.LSE_GRADIENT, "the LSE takes part in the loss, and how fast cuDNN is then was not measured")


def slower(
    call: Call, program: Program, hoisted: Sequence[Hoisted], training: bool,
    real: Callable[[Node], torch.Tensor | None],
) -> Reason | None:  # fmt: skip
    """A reason to keep the call, or None. `real` gives the tensor of an input of the graph."""
    stored = _pair_operands(program, hoisted)
    if stored and (training or min(d.itemsize for d in stored) < FORWARD_ITEMSIZE):
        return Reason(Code.SLOWER, "a score over (q, kv) pairs is read from memory, which cuDNN does slower")
    if not call.blocks:
        return None
    sizes = hint(example(call.query).shape[2]), hint(example(call.key).shape[2])
    ours = _pairs(program, sizes, training)
    share = _share(call, real)
    if share is None:
        form = split(program.mask)
        known = form.residual is TRUE and not any("q" in bias.dims for bias in form.biases)
        unknown = Reason(Code.SLOWER, "a mask without tile skipping, under a BlockMask made in the graph")
        return None if known else unknown
    theirs = share * sizes[0] * sizes[1]
    if ours * PAIR_COST <= theirs:
        return None
    percent = ours / (sizes[0] * sizes[1])
    return Reason(Code.SLOWER, f"cuDNN would compute {percent:.0%} of the pairs, the BlockMask lists {share:.0%}")


def slower_by_intervals(
    call: Call, training: bool, calls: int, real: Callable[[Node], torch.Tensor | None]
) -> Reason | None:
    """A reason not to run by intervals, or None, for a mask that so many calls share."""
    share = _share(call, real) if call.blocks else 1.0
    query, key, value = (tuple(hint(n) for n in example(node).shape) for node in (call.query, call.key, call.value))
    pairs = (GUESSED_SHARE if share is None else share) * query[0] * query[1] * query[2] * key[2]
    time = pairs * 2 * (query[3] + value[3]) / INDUCTOR_RATE * (1 + BACKWARD_TIME if training else 1)
    if calls * time * INTERVALS_GAIN >= INTERVALS_SETUP:
        return None
    saved = calls * time * INTERVALS_GAIN
    return Reason(Code.SLOWER, f"listing the mask's tiles takes longer than the {saved:.2f} ms that it saves a step")


def _pair_operands(program: Program, hoisted: Sequence[Hoisted]) -> list[torch.dtype]:
    """The dtypes of the operands over (q, kv) pairs that the score reads."""
    operands = [n for n in ir.walk(program.score) if n.kind == "operand" and {"q", "k"} <= set(n.dims)]
    return [hoisted[int(n.value or 0)].stored for n in operands]


def _pairs(program: Program, lengths: tuple[int, int], training: bool) -> float:
    """How many pairs the plans of forward and backward compute, on average, and what costs like pairs."""
    program = pruned(program, lengths)
    total = float(cost(program, lengths, FORWARD))
    if training:
        total = (total + BACKWARD_WEIGHT * cost(program, lengths, BACKWARD)) / (1 + BACKWARD_WEIGHT)
    total *= PARTS_COST if len(divided(program, lengths, FORWARD) or ()) > 1 else 1.0
    return total * (BIAS_COST if split(program.mask).biases else 1.0)


def _share(call: Call, real: Callable[[Node], torch.Tensor | None]) -> float | None:
    """The share of blocks that the BlockMask lists, if its tensors are at hand."""
    pairs = [pair for pair in (call.blocks[:2], call.blocks[2:4]) if None not in pair]
    tensors = [[real(block) for block in pair] for pair in pairs]  # pyright: ignore[reportArgumentType]
    if any(t is None for pair in tensors for t in pair):
        return None
    with torch.no_grad():
        masks = [listed(count, indices, indices.shape[-1]) for count, indices in tensors]  # pyright: ignore
        return sum(float(m.float().mean()) for m in masks)
