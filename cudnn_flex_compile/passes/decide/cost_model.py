"""Predicts the time of a call on cuDNN and on Inductor's kernel, from the pairs that either computes, and from the time
that each way takes for them on this kind of device (device_times.py).

The rules (keep_rules.py, tile_speed.py) decide by it. Each constant names the command that reproduces it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.fx import Node

from cudnn_flex_compile.engine.plans.box_plan import cost, divided
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.kernels.block_mask import listed
from cudnn_flex_compile.passes.decide.device_times import (
    CAPPED,
    CHAINED,
    INDUCTOR,
    MASKED,
    NATIVE,
    PLAIN,
    TILE_LISTS,
    times_of,
)  # fmt: skip
from cudnn_flex_compile.passes.read.call import Call, example, hint
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import Program
from cudnn_flex_compile.scoremod.learned import without_bias
from cudnn_flex_compile.scoremod.masks.boxes import pruned
from cudnn_flex_compile.scoremod.masks.form import split
from cudnn_flex_compile.scoremod.partition import Hoisted

# The cost of hiding pairs by a bias. (cudnn-flex bench --mods "dilated window" documents --lower always)
BIAS_COST = 1.8
# Several plans in the forward keep the host busy: as called, sinks + window take 1.11 times as long as Inductor's
# kernel, prefix-LM 0.95 times, where by their pairs it were 0.94 and 0.76 times.
# (cudnn-flex bench --mods "sink tokens + window" prefix-LM --lower always)
PARTS_COST = 1.15
# Functions that a kernel computes with many instructions. A score with one of them costs as much as a soft cap.
COSTLY = {"tanh", "sigmoid", "exp", "exp2", "log", "erf", "sin", "cos", "pow"}
# The shares of a BlockMask that is not at hand: the blocks that it lists, and the listed ones at which the mask is
# computed, if that reads captured tensors.
GUESSED = (0.1, 0.25)
# The calls that share a BlockMask which comes from outside of a graph with one call, and whose tensors are not at hand:
# a trainer compiles flex_attention, or each layer, by itself, and models have as many layers, or more.
LAYERS = 12
DOCUMENTS = "python3 -m tests.measure.documents_time"


@dataclass(frozen=True, slots=True)
class Line:
    """A line of milliseconds: the time at zero, and the slope for each unit."""

    base: float
    slope: float

    def at(self, units: float) -> float:
        return self.base + self.slope * units


# The time that a list of tiles adds to a step, by 10^9 pairs of the mask. (DOCUMENTS)
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


class Blocks(NamedTuple):
    """The blocks that a BlockMask lists.

    Attributes:
        share: the share of all blocks that is listed.
        partial: the share of the listed blocks at which the mask is computed.
    """

    share: float
    partial: float


@dataclass(frozen=True, slots=True)
class CostInputs:
    """The facts of a call that its costs depend on.

    Attributes:
        program, hoisted: the program that would run, and its operands.
        training: whether a gradient may be asked for.
        lse_gradient: whether a gradient of the log-sum-exp may be asked for, too.
        blocks: the blocks that its BlockMask lists; None without one, or if they are not known.
        around: None where the host's time for the call does not count: attention alone, or under CUDA graphs.
        tiled: the directions that would run by a list of its mask's tiles (passes/write/tile_lists.py).
        sharing: the number of calls that have its mask: of the graph, or LAYERS.
    """

    call: Call
    program: Program
    hoisted: Sequence[Hoisted]
    training: bool
    lse_gradient: bool
    blocks: Blocks | None
    around: Workload | None
    tiled: tuple[str, ...] = ()
    sharing: int = 1

    @property
    def directions(self) -> tuple[str, ...]:
        """The directions that may run."""
        return (FORWARD, BACKWARD) if self.training else (FORWARD,)

    @property
    def lengths(self) -> tuple[int, int]:
        return hint(example(self.call.query).shape[2]), hint(example(self.call.key).shape[2])

    @property
    def tflop(self) -> float:
        """The TFLOP of a forward on all pairs."""
        batch, heads, queries, dim = map(hint, example(self.call.query).shape)
        _, _, keys, value_dim = map(hint, example(self.call.value).shape)
        return 2 * (dim + value_dim) * batch * heads * queries * keys / 1e12

    @property
    def kind(self) -> str:
        """The kind of call by its score, of those that are measured."""
        return CAPPED if any(node.kind in COSTLY for node in ir.walk(self.program.score)) else PLAIN

    @property
    def reads_mask(self) -> bool:
        """Whether the mask reads captured tensors."""
        return any(node.kind == "operand" for node in ir.walk(self.program.mask))

    def rate(self, way: str, direction: str, kind: str) -> float | None:
        """Milliseconds a TFLOP of the forward's two products, on this device; None if it was not measured."""
        device = example(self.call.query).device
        dim = max(hint(example(node).shape[3]) for node in (self.call.query, self.call.value))
        return times_of(device).rate(way, direction, kind, dim, min(self.lengths))


def pair_operands(inputs: CostInputs) -> list[torch.dtype]:
    """The dtypes of the operands over (q, kv) pairs that the score_mod reads, without a learned bias."""
    operands = [n for n in ir.walk(without_bias(inputs.program.score)[0]) if n.kind == "operand"]
    return [inputs.hoisted[int(n.value or 0)].stored for n in operands if {"q", "k"} <= set(n.dims)]


@functools.lru_cache(1024)
def pairs_of(program: Program, lengths: tuple[int, int], direction: str) -> float:
    """The number of pairs of a head that the graphs of a direction compute, with other costs counted in pairs."""
    program = pruned(program, lengths)
    several = direction == FORWARD and len(divided(program, lengths, direction) or ()) > 1
    factors = (PARTS_COST if several else 1.0) * (BIAS_COST if split(program.mask).biases else 1.0)
    return cost(program, lengths, direction) * factors


def stock_times(inputs: CostInputs) -> dict[str, float]:
    """Milliseconds of the GPU on Inductor's kernel, by direction.

    It computes the blocks that the BlockMask lists, and the mask where a block is partial.
    """
    share, partial = inputs.blocks or (None if inputs.call.blocks else 1.0, GUESSED[1])
    found: dict[str, float] = {}
    for way in inputs.directions:
        rate = inputs.rate(INDUCTOR, way, inputs.kind) or 0.0
        if inputs.reads_mask and inputs.call.blocks:
            plain, masked = (inputs.rate(INDUCTOR, way, kind) or 0.0 for kind in (PLAIN, MASKED))
            rate += partial * max(masked - plain, 0.0)
        found[way] = rate * inputs.tflop * (_guessed(inputs, way) if share is None else share)
    return found


@functools.lru_cache(1024)
def _bounds(program: Program, lengths: tuple[int, int], direction: str) -> float:
    """The share of all pairs that the mask's bounds show, in whole tiles of a graph."""
    return cost(pruned(program, lengths), lengths, direction) / (lengths[0] * lengths[1])


def _guessed(inputs: CostInputs, direction: str) -> float:
    """The share of the blocks that a BlockMask lists whose tensors are not at hand.

    A mask that reads captured tensors, such as packed documents, is taken to show little: graphs, which compute more
    than they have to for it, must not be chosen by a guess.
    """
    bounds = _bounds(inputs.program, inputs.lengths, direction)
    return min(bounds, GUESSED[0]) if inputs.reads_mask or split(inputs.program.mask).reads_pairs else bounds


def graph_times(inputs: CostInputs) -> dict[str, float]:
    """Milliseconds of the GPU on cuDNN's graphs, by direction."""
    queries, keys = inputs.lengths
    form = split(inputs.program.mask)
    native = inputs.kind == PLAIN and inputs.program.score is ir.SCORE and form.skips_tiles
    found: dict[str, float] = {}
    for way in inputs.directions:
        rate = inputs.rate(NATIVE if native else CHAINED, way, inputs.kind) or inputs.rate(NATIVE, way, PLAIN) or 0.0
        found[way] = rate * inputs.tflop * pairs_of(inputs.program, inputs.lengths, way) / (queries * keys)
    return found


def tile_times(inputs: CostInputs) -> dict[str, float] | None:
    """Milliseconds of the GPU by a list of tiles, by direction, without making the list; None without such kernels."""
    unknown = inputs.blocks is None and inputs.call.blocks
    share = 1.0 if inputs.blocks is None else inputs.blocks.share
    found: dict[str, float] = {}
    for way in inputs.directions:
        rate = inputs.rate(TILE_LISTS, way, PLAIN)
        if rate is None:
            return None
        visible = _guessed(inputs, way) if unknown else min(share, _bounds(inputs.program, inputs.lengths, way))
        found[way] = rate * inputs.tflop * visible
    return found


def list_time(inputs: CostInputs) -> float:
    """Milliseconds that a step takes for the list of the tiles of a mask."""
    batch, heads, queries, _ = map(hint, example(inputs.call.query).shape)
    of_mask = batch * queries * inputs.lengths[1] * (heads if "h" in ir.axes_of(inputs.program.mask) else 1)
    return LIST_TIME.at(of_mask / 1e9)


def our_times(inputs: CostInputs) -> dict[str, float] | None:
    """Milliseconds of the GPU by direction, each in its way of `inputs.tiled`; None if they are not known."""
    graphs, tiles = graph_times(inputs), tile_times(inputs) if inputs.tiled else {}
    return None if tiles is None else {way: (tiles if way in inputs.tiled else graphs)[way] for way in graphs}


def spared(inputs: CostInputs) -> float:
    """Milliseconds of the GPU that a call saves by graphs."""
    return sum(stock_times(inputs).values()) - sum(graph_times(inputs).values())


def host_counts(inputs: CostInputs) -> bool:
    """Whether the GPU may wait for the host, so that the host's time for a call counts."""
    around = inputs.around
    if around is None:
        return False
    gpu = PRODUCTS[inputs.training] * around.tflop + around.calls * sum(stock_times(inputs).values())
    return gpu < SURELY_GPU[inputs.training] * LAUNCHES[inputs.training] * (around.products + around.calls)


def expected(inputs: CostInputs) -> float | None:
    """The speed of the call relative to Inductor's kernel, by the times that are predicted for either.

    None if the BlockMask's blocks are not known, or if the score is read from memory.
    """
    if (inputs.call.blocks and inputs.blocks is None and not inputs.tiled) or pair_operands(inputs):
        return None
    ours = our_times(inputs)
    if ours is None:
        return None
    listing = list_time(inputs) / inputs.sharing if inputs.tiled and inputs.reads_mask else 0.0
    taken = sum(ours.values()) + listing
    return sum(stock_times(inputs).values()) / taken if taken else None


def blocks_of(call: Call, real: Callable[[Node], torch.Tensor | None]) -> Blocks | None:
    """The blocks that the BlockMask lists, if its tensors are at hand.

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
        partial, *full = (float(m.float().mean()) for m in masks)
    share = partial + sum(full)
    return Blocks(share, partial / share if share else 1.0)
