"""Estimates the time of a call on cuDNN and on Inductor's kernel, from the pairs that either computes and from measured
lines.

keep_rules.py decides by the estimates. Each constant names the command that reproduces it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from cudnn_flex_compile.engine.plans.box_plan import cost, divided
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.kernels.block_mask import listed
from cudnn_flex_compile.passes.read.call import Call, example, hint
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import Program
from cudnn_flex_compile.scoremod.learned import without_bias
from cudnn_flex_compile.scoremod.masks.boxes import pruned
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.partition import Hoisted

# A (q, kv) pair costs cuDNN this share of what it costs Inductor's kernel. cuDNN skips only what bands rule out,
# Inductor all blocks that the BlockMask omits.
# (cudnn-flex bench --mods causal prefix-LM documents --mode reduce-overhead --lower always)
PAIR_COST = 0.75
# The cost of a pair under a soft cap on Inductor, in pairs of a plain score. (python3 -m tests.measure.lse_time)
CAPPED_COST = 1.7
# At lengths below this, the host and whole tiles decide, not the pairs. (cudnn-flex bench --forty)
BY_PAIRS = 2048
# The cost of hiding pairs by a bias. (cudnn-flex bench --mods "dilated window" documents --lower always)
BIAS_COST = 1.8
# Several plans in the forward keep the host busy: as called, sinks + window take 1.11 times as long as Inductor's
# kernel, prefix-LM 0.95 times, where by their pairs it were 0.94 and 0.76 times.
# (cudnn-flex bench --mods "sink tokens + window" prefix-LM --lower always)
PARTS_COST = 1.15
BACKWARD_WEIGHT = 2.7  # the cost of a pair in the backward, where it is 1 in the forward
GUESSED_SHARE = 0.1  # the share of blocks that a BlockMask is taken to list whose tensors are not at hand
DOCUMENTS = "python3 -m tests.measure.documents_time"


@dataclass(frozen=True, slots=True)
class Line:
    """A line of milliseconds: the time at zero, and the slope for each unit."""

    base: float
    slope: float

    def at(self, units: float) -> float:
        return self.base + self.slope * units


# The time of a call, without and with its backward, on Inductor's kernel and on interval kernels, by the TFLOP of one
# forward on the blocks that its BlockMask lists; and the time that a list of tiles adds to a step, by 10^9 pairs of the
# mask. DOCUMENTS prints these lines as it measures them, on an H200, where the host bounds the interval kernels of all
# but large calls. It measures the device alone for the forward; the host's time of both directions replaces it.
CALL_TIME = {
    False: (Line(0.061, 2.89), Line(0.450, 1.42)),
    True: (Line(0.330, 8.84), Line(0.450, 3.60)),
}
LIST_TIME = Line(1.254, 0.56)
# The time of a graph's work besides attention, without and with the backward, in milliseconds: the GPU's for each TFLOP
# of matrix products, and the host's for each product and each call. (python3 -m tests.measure.host_share)
PRODUCTS = {False: 2.3, True: 3 * 2.3}
LAUNCHES = {False: 0.1, True: 0.28}
# If the GPU's time is so many times the host's, without and with the backward, a step surely waits for the GPU, even if
# models make a BlockMask and more besides. A step of BERT (1.5 times) is between 0.90 and 1.04 times as long on
# Inductor's kernels, depending on the machine's other work; one of examples/train.py (1.9 times) 1.11 times. The
# forwards of Mistral (2.8 times) and Llama (3.0) were 0.97 and 0.99 times as long, GPT-NeoX's (4.2) 1.03 times.
# (python3 -m tests.measure.models --cases bert:full mistral:full llama:none gpt_neox:full)
SURELY_GPU = {False: 3.5, True: 1.7}


@dataclass(frozen=True, slots=True)
class Workload:
    """The work of a graph whose kernels the host launches one by one.

    Attributes:
        products: the number of matrix products in the forward. tflop: their TFLOP.
        calls: the number of attention calls.
    """

    products: int
    tflop: float
    calls: int


@dataclass(frozen=True, slots=True)
class CostInputs:
    """The facts of a call that its costs depend on.

    Attributes:
        program, hoisted: the program that would run, and its operands.
        training: whether a gradient may be asked for.
        lse_gradient: whether a gradient of the log-sum-exp may be asked for, too.
        share: the share of the blocks that its BlockMask lists; None without one, or if it is not known.
        around: None where the host's time for the call does not count: attention alone, or under CUDA graphs.
        tiled: the directions that would run by a list of its mask's tiles (passes/write/tile_lists.py).
        sharing: the number of calls of the graph that have its mask.
    """

    call: Call
    program: Program
    hoisted: Sequence[Hoisted]
    training: bool
    lse_gradient: bool
    share: float | None
    around: Workload | None
    tiled: tuple[str, ...] = ()
    sharing: int = 1

    @property
    def lengths(self) -> tuple[int, int]:
        return hint(example(self.call.query).shape[2]), hint(example(self.call.key).shape[2])

    @property
    def tflop(self) -> float:
        """The TFLOP of a forward on all pairs."""
        batch, heads, queries, dim = map(hint, example(self.call.query).shape)
        _, _, keys, value_dim = map(hint, example(self.call.value).shape)
        return 2 * (dim + value_dim) * batch * heads * queries * keys / 1e12


def pair_operands(inputs: CostInputs) -> list[torch.dtype]:
    """The dtypes of the operands over (q, kv) pairs that the score_mod reads, without a learned bias."""
    operands = [n for n in ir.walk(without_bias(inputs.program.score)[0]) if n.kind == "operand"]
    return [inputs.hoisted[int(n.value or 0)].stored for n in operands if {"q", "k"} <= set(n.dims)]


def pairs_of(program: Program, lengths: tuple[int, int], training: bool) -> float:
    """The number of pairs that the plans of forward and backward compute, on average, with costs that count as pairs.
    """
    program = pruned(program, lengths)
    total = float(cost(program, lengths, FORWARD))
    if training:
        total = (total + BACKWARD_WEIGHT * cost(program, lengths, BACKWARD)) / (1 + BACKWARD_WEIGHT)
    total *= PARTS_COST if len(divided(program, lengths, FORWARD) or ()) > 1 else 1.0
    return total * (BIAS_COST if split(program.mask).biases else 1.0)


def pairs_by_either(inputs: CostInputs) -> tuple[float, float]:
    """The cost of a head on Inductor's kernel, and by plans, in pairs of a plain score on Inductor's kernel.

    Both are taken to compute the same pairs if it is not known which blocks the BlockMask lists.
    """
    queries, keys = inputs.lengths
    computed = pairs_of(inputs.program, inputs.lengths, inputs.training)
    share = inputs.share if inputs.call.blocks else 1.0
    stock = computed if share is None else share * queries * keys
    capped = any(node.kind == "tanh" for node in ir.walk(inputs.program.score))
    return stock * (CAPPED_COST if capped else 1.0), computed * PAIR_COST


def times_by_either(inputs: CostInputs) -> tuple[float, float]:
    """The GPU's time for a call on Inductor's kernel, and by plans, in milliseconds, by the pairs of either."""
    queries, keys = inputs.lengths
    slope = CALL_TIME[inputs.training][0].slope * inputs.tflop / (queries * keys)
    stock, ours = pairs_by_either(inputs)
    return slope * stock, slope * ours


def spared(inputs: CostInputs) -> float:
    """The GPU's time that a call saves by plans, in milliseconds."""
    stock, ours = times_by_either(inputs)
    return stock - ours


def host_counts(inputs: CostInputs) -> bool:
    """Whether the GPU may wait for the host, so that the host's time for a call counts."""
    around = inputs.around
    if around is None:
        return False
    gpu = PRODUCTS[inputs.training] * around.tflop + around.calls * times_by_either(inputs)[0]
    return gpu < SURELY_GPU[inputs.training] * LAUNCHES[inputs.training] * (around.products + around.calls)


def interval_times(inputs: CostInputs) -> tuple[float, float, float]:
    """The time of all calls with one mask in a step, in milliseconds: on Inductor's kernel, by a tile list, and the
    time of the list.
    """
    call, share = inputs.call, inputs.share if inputs.call.blocks else 1.0
    visible = GUESSED_SHARE if share is None else share
    stock, ours = (line.at(visible * inputs.tflop) for line in CALL_TIME[inputs.training])
    batch, heads, queries, _ = map(hint, example(call.query).shape)
    of_mask = batch * queries * inputs.lengths[1] * (heads if "h" in ir.axes_of(inputs.program.mask) else 1)
    return inputs.sharing * stock, inputs.sharing * ours, LIST_TIME.at(of_mask / 1e9)


def expected(inputs: CostInputs) -> float | None:
    """The speed of plans relative to Inductor's kernel, by the pairs that either computes; None if it is not known.

    It leaves out the arithmetic of a score, which makes plans faster still with a soft cap, for one.
    """
    if inputs.tiled:
        stock, ours, listing = interval_times(inputs)
        return stock / (ours + listing)
    lengths = inputs.lengths
    share = inputs.share if inputs.call.blocks else 1.0
    if share is None or min(lengths) < BY_PAIRS or pair_operands(inputs):
        return None
    ours = pairs_of(inputs.program, lengths, inputs.training) * PAIR_COST
    return share * lengths[0] * lengths[1] / ours if ours else None


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
