"""Which calls stock flex_attention runs faster, as measured: one table, and what its conditions are computed from.

Knows nothing of numbers' correctness. Each row names the command that reproduces it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from cudnn_flex_compile.engine.parts import cost, divided
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.kernels.block_mask import listed
from cudnn_flex_compile.passes.find import Call, example, hint
from cudnn_flex_compile.reasons import Code, Reason
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, TRUE, Program
from cudnn_flex_compile.scoremod.learned import without_bias
from cudnn_flex_compile.scoremod.masks.boxes import pruned
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.partition import Hoisted

# A (q, kv) pair costs cuDNN this share of what it costs Inductor's kernel. cuDNN skips only what bands rule out,
# Inductor all blocks that the BlockMask omits.
# (cudnn-flex bench --mods causal prefix-LM documents --mode reduce-overhead --lower always)
PAIR_COST = 0.75
# At lengths below this, the host and whole tiles decide, not the pairs. (cudnn-flex bench --forty)
BY_PAIRS = 2048
# What hiding pairs by a bias costs. (cudnn-flex bench --mods "dilated window" documents --lower always)
BIAS_COST = 1.8
# Several plans in the forward keep the host busy: as called, sinks + window take 1.11 times as long as Inductor's
# kernel, prefix-LM 0.95 times, where by their pairs it were 0.94 and 0.76 times.
# (cudnn-flex bench --mods "sink tokens + window" prefix-LM --lower always)
PARTS_COST = 1.15
# What a gradient of the log-sum-exp costs cuDNN, whatever a query sees: as much as so many keys of it cost Inductor's
# kernel. Causal at 4096, 2048 keys a query, is 1.35 times as fast as Inductor without it and 1.27 times with it; a
# window of 128 is 0.70 times as fast with it: both give 96 keys. And what a pair under a soft cap costs Inductor, in
# those of a plain score: it makes 2.3x of 1.35x. (python3 -m tests.gpu.lse_time)
LSE_COST = 128
CAPPED_COST = 1.7
BACKWARD_WEIGHT = 2.7  # of a pair in the backward, where it is 1 in the forward
GUESSED_SHARE = 0.1  # of the blocks that a BlockMask lists which is not at hand
# A score's own bias over pairs: Inductor gathers it faster, but for items of this many bytes in the forward.
FORWARD_ITEMSIZE = 4
SELECTION = "python3 -m tests.gpu.selection"


@dataclass(frozen=True, slots=True)
class Sizes:
    """A box of sizes, ends included, in which a call is kept on CUDA devices.

    Attributes:
        training: whether gradients are recorded.
        queries, keys, head_dim: lengths, and the head dim of queries and keys.
        why: what the call is.
    """

    why: str
    training: bool
    queries: tuple[float, float] = (1, math.inf)
    keys: tuple[float, float] = (1, math.inf)
    head_dim: tuple[float, float] = (1, math.inf)


# To be changed after a run of SELECTION: its table says for each size how much faster we are.
SIZES = (
    Sizes("decoding: a few queries, for which Inductor has a kernel that divides the keys", False, queries=(1, 16)),
    # 197 queries: a step of a ViT of 4 layers took 1.08 times as long (python3 -m tests.gpu.models --cases vit:none).
    Sizes("a short sequence, where the host takes longer than the GPU", True, queries=(1, 256), keys=(1, 256)),
)


@dataclass(frozen=True, slots=True)
class Line:
    """Milliseconds: at nothing, and for each unit more."""

    base: float
    slope: float

    def at(self, units: float) -> float:
        return self.base + self.slope * units


# What a call takes, without and with its backward, on Inductor's kernel and on interval kernels, by the TFLOP of one
# forward on the blocks that its BlockMask lists; and what a list of tiles adds to a step, by 10^9 pairs of the mask.
# DOCUMENTS prints these lines as it measures them: on an H200, where the host bounds the interval kernels of all but
# large calls. Of the forward it measures the device alone; the host's time of forward and backward stands in its place.
CALLS = {
    False: (Line(0.038, 3.38), Line(0.433, 1.40)),
    True: (Line(0.126, 16.24), Line(0.433, 5.85)),
}
LIST = Line(1.253, 0.59)
SURELY = 1.2  # times what a list takes is to be saved
DOCUMENTS = "python3 -m tests.gpu.documents_time"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a call.

    Attributes:
        program, hoisted: what would run.
        training: whether a gradient may be asked for.
        lse_gradient: whether one of the log-sum-exp may be, too.
        share: of the blocks, that its BlockMask lists; None without one, or if that is not known.
        tiled: whether it would run by a list of its mask's tiles (passes/intervals.py).
        sharing: how many calls would share that list.
    """

    call: Call
    program: Program
    hoisted: Sequence[Hoisted]
    training: bool
    lse_gradient: bool
    share: float | None
    tiled: bool = False
    sharing: int = 1

    @property
    def lengths(self) -> tuple[int, int]:
        return hint(example(self.call.query).shape[2]), hint(example(self.call.key).shape[2])


@dataclass(frozen=True, slots=True)
class Row:
    """A rule.

    Attributes:
        applies: why such a call is kept, or None.
        command: what reproduces the measurement.
        code: of the reason.
        tiled: whether it is about calls by lists of tiles, or about others; None for both.
    """

    applies: Callable[[Facts], str | None]
    command: str
    code: Code = Code.SLOWER
    tiled: bool | None = False


def _lse_in_the_loss(facts: Facts) -> str | None:
    """By row vectors or wider values, which float16 needs, cuDNN took 1.1 to 3.4 times as long as Inductor's kernel for
    plain scores, and 0.6 to 1.1 times with a soft cap (measured in bfloat16, where engine/folded.py makes neither
    needed). In bfloat16 it takes a pass over the outputs, which is as long as the kernels of a narrow window.
    """
    if not facts.lse_gradient:
        return None
    if example(facts.call.query).dtype != torch.bfloat16:
        return "the LSE takes part in the loss, in another dtype than bfloat16"
    queries, keys = facts.lengths
    ours = _pairs(facts.program, facts.lengths, True) / queries
    share = facts.share if facts.call.blocks else 1.0
    theirs = ours if share is None else share * keys
    if any(node.kind == "tanh" for node in ir.walk(facts.program.score)):
        theirs *= CAPPED_COST
    few = f"the LSE takes part in the loss, and a query has {ours:.0f} keys to compute on average"
    return few if ours * PAIR_COST + LSE_COST > theirs else None


def _by_sizes(facts: Facts) -> str | None:
    """On the CPU, where programs are checked and explained, sizes say nothing of those to come."""
    if example(facts.call.query).device.type != "cuda":
        return None
    found = (*facts.lengths, hint(example(facts.call.query).shape[3]))
    for box in SIZES:
        ranges = (box.queries, box.keys, box.head_dim)
        if box.training == facts.training and all(
            low <= n <= high for n, (low, high) in zip(found, ranges, strict=True)
        ):
            return f"{box.why} ({found[0]} queries, {found[1]} keys)"
    return None


def _pair_operands(facts: Facts) -> list[torch.dtype]:
    """The dtypes of the operands over (q, kv) pairs that the score_mod reads; a learned bias is none of its."""
    operands = [n for n in ir.walk(without_bias(facts.program.score)[0]) if n.kind == "operand"]
    return [facts.hoisted[int(n.value or 0)].stored for n in operands if {"q", "k"} <= set(n.dims)]


def _pairs_are_read(facts: Facts) -> str | None:
    stored = _pair_operands(facts)
    if stored and (facts.training or min(d.itemsize for d in stored) < FORWARD_ITEMSIZE):
        return "a score over (q, kv) pairs is read from memory, which cuDNN does slower"
    return None


def _learned_by_place(facts: Facts) -> str | None:
    """Of t[h, q, kv] and t[kv] cuDNN takes 1.05 and 1.09 times as long as Inductor's kernel, which adds up few
    gradients for each entry; of slopes[h] * (kv - q) a 64th. Where it reads a table at a captured index, as for T5,
    Inductor's kernel of torch 2.11 needs more shared memory than an H200 has.
    """
    roots = [part.expression for part in facts.hoisted if part.learned]
    reads = [n for n in ir.walk(*roots) if n.kind == "gather" and n.dtype == F32]
    for read in reads:
        places = {i.value for i in read.args[1:] if i.kind == "index"}
        if places & {"q", "k"} and all(i.kind in ("index", "const") for i in read.args[1:]):
            return "a captured tensor that requires grad has an entry for each query or key"
    return None


def _unknown_blocks(facts: Facts) -> str | None:
    form = split(facts.program.mask)
    skipped = form.residual is TRUE and not any("q" in bias.dims for bias in form.biases)
    if not facts.call.blocks or facts.share is not None or skipped:
        return None
    return "a mask without tile skipping, under a BlockMask made in the graph"


def _more_pairs(facts: Facts) -> str | None:
    if facts.share is None:
        return None
    lengths = facts.lengths
    all_pairs = lengths[0] * lengths[1]
    ours = _pairs(facts.program, lengths, facts.training)
    if ours * PAIR_COST <= facts.share * all_pairs:
        return None
    return f"cuDNN would compute {ours / all_pairs:.0%} of the pairs, the BlockMask lists {facts.share:.0%}"


def _interval_times(facts: Facts) -> tuple[float, float, float]:
    """Milliseconds that all calls with one mask take a step, on Inductor's kernel and by intervals, and their list."""
    call, share = facts.call, facts.share if facts.call.blocks else 1.0
    query, key, value = (tuple(hint(n) for n in example(node).shape) for node in (call.query, call.key, call.value))
    pairs = query[0] * query[2] * key[2]
    visible = pairs * query[1] * (GUESSED_SHARE if share is None else share)
    stock, ours = (line.at(2 * (query[3] + value[3]) * visible / 1e12) for line in CALLS[facts.training])
    of_mask = pairs * (query[1] if "h" in ir.axes_of(facts.program.mask) else 1)
    return facts.sharing * stock, facts.sharing * ours, LIST.at(of_mask / 1e9)


def _listing_takes_longer(facts: Facts) -> str | None:
    stock, ours, listing = _interval_times(facts)
    if stock - ours > SURELY * listing:
        return None
    calls = f"{facts.sharing} call{'s' if facts.sharing > 1 else ''}"
    return f"listing the mask's tiles takes about {listing:.2f} ms a step, and {calls} would save {stock - ours:.2f} ms"


ROWS = (
    Row(_lse_in_the_loss, "python3 -m tests.gpu.lse_time", Code.LSE_GRADIENT),
    Row(_by_sizes, SELECTION, tiled=None),
    Row(_pairs_are_read, 'cudnn-flex bench --mods "relative table" "bias tensor" --lower always'),
    Row(_learned_by_place, "python3 -m tests.gpu.bias_time"),
    Row(_unknown_blocks, 'cudnn-flex bench --mods "dilated window" documents --lower always'),
    Row(_more_pairs, "cudnn-flex bench --mods causal prefix-LM documents --mode reduce-overhead --lower always"),
    Row(_listing_takes_longer, DOCUMENTS, tiled=True),
)


def slower(facts: Facts) -> Reason | None:
    """The reason of the first row that applies, or None."""
    for row in ROWS:
        if row.tiled not in (None, facts.tiled):
            continue
        detail = row.applies(facts)
        if detail is not None:
            return Reason(row.code, f"{detail} ({row.command})")
    return None


def expected(facts: Facts) -> float | None:
    """How many times as fast as Inductor's kernel the plans are, by the pairs that either computes; None if that is not
    known. What a score's arithmetic adds to this is not in it: with a soft cap, for one, it is more.
    """
    if facts.tiled:
        stock, ours, listing = _interval_times(facts)
        return stock / (ours + listing)
    lengths = facts.lengths
    share = facts.share if facts.call.blocks else 1.0
    if share is None or min(lengths) < BY_PAIRS or _pair_operands(facts):
        return None
    ours = _pairs(facts.program, lengths, facts.training) * PAIR_COST
    return share * lengths[0] * lengths[1] / ours if ours else None


def _pairs(program: Program, lengths: tuple[int, int], training: bool) -> float:
    """How many pairs the plans of forward and backward compute, on average, and what costs like pairs."""
    program = pruned(program, lengths)
    total = float(cost(program, lengths, FORWARD))
    if training:
        total = (total + BACKWARD_WEIGHT * cost(program, lengths, BACKWARD)) / (1 + BACKWARD_WEIGHT)
    total *= PARTS_COST if len(divided(program, lengths, FORWARD) or ()) > 1 else 1.0
    return total * (BIAS_COST if split(program.mask).biases else 1.0)


def share_of(call: Call, real: Callable[[Node], torch.Tensor | None]) -> float | None:
    """The share of blocks that the BlockMask lists, if its tensors are at hand.

    Args:
        real: gives the tensor of an input of the graph.
    """
    if not call.blocks:
        return None
    pairs = [pair for pair in (call.blocks[:2], call.blocks[2:4]) if None not in pair]
    tensors = [[real(block) for block in pair] for pair in pairs]  # pyright: ignore[reportArgumentType]
    if any(t is None for pair in tensors for t in pair):
        return None
    with torch.no_grad():
        masks = [listed(count, indices, indices.shape[-1]) for count, indices in tensors]  # pyright: ignore
        return sum(float(m.float().mean()) for m in masks)
