"""Predicts the time of each way to run a call: by the pairs that it computes, by what it takes for them on this kind of
device (device_times.py), and by what a step takes besides.

chooser.py compares the times. Each constant names the command that reproduces it.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cudnn_flex_compile.engine.plans.box_plan import cost, divided
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.passes.decide.cost_inputs import CostInputs
from cudnn_flex_compile.passes.decide.device_times import CHAINED, INDUCTOR, MASKED, NATIVE, PLAIN, TILE_LISTS
from cudnn_flex_compile.passes.read.call import example, hint
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import F32, Program
from cudnn_flex_compile.scoremod.learned import without_bias
from cudnn_flex_compile.scoremod.masks.boxes import pruned
from cudnn_flex_compile.scoremod.masks.form import split

TILE = 128  # rows and columns of the tiles in which all ways compute pairs
# The cost of hiding pairs by a bias. (cudnn-flex bench --mods "dilated window" documents --lower always)
BIAS_COST = 1.8
# Several plans in the forward keep the host busy: as called, sinks + window take 1.11 times as long as Inductor's
# kernel, prefix-LM 0.95 times, where by their pairs it were 0.94 and 0.76 times.
# (cudnn-flex bench --mods "sink tokens + window" prefix-LM --lower always)
PARTS_COST = 1.15
# The shares of a BlockMask that is not at hand: the blocks that it lists, and the listed ones at which the mask is
# computed, if that reads captured tensors.
GUESSED = (0.1, 0.25)
# Graphs read a score over (q, kv) pairs from memory, which Inductor's kernel computes. They take so many times its
# time, but for items of FORWARD_ITEMSIZE bytes in the forward.
# (cudnn-flex bench --mods "relative table" "bias tensor" --lower always)
PAIRS_READ, FORWARD_ITEMSIZE = 1.15, 4
# The same of a learned tensor with an entry for each query or key: 1.05 for t[h, q, kv], and 1.09 for t[kv]. For
# slopes[h] * (kv - q) cuDNN takes a 64th. Where a table is read at a captured index, as for T5, Inductor's kernel of
# torch 2.11 needs more shared memory than an H200 has. (python3 -m tests.measure.bias_time)
LEARNED_BY_PLACE = 1.07
# The cost of a gradient of the log-sum-exp on cuDNN for each query, in keys of the query on Inductor's kernel: a pass
# over the outputs (engine/plans/folded_output.py). (python3 -m tests.measure.lse_time)
LSE_COST = 128


LIST_ERROR = 1.2  # how many times as long as predicted a list may take
# The times of a step besides kernels, on the machine of the H200. The file says what each is, and what measures it.
STEP_TIMES = Path(__file__).with_name("step_times.json")
STEP: dict[str, list[float]] = {name: of["milliseconds"] for name, of in json.loads(STEP_TIMES.read_text()).items()}
# If the GPU's time is so many times the host's, without and with the backward, a step surely waits for the GPU, even if
# models make a BlockMask and more besides. A step of BERT (1.5 times) is between 0.90 and 1.04 times as long on
# Inductor's kernels, depending on the machine's other work; one of examples/train.py (1.9 times) 1.11 times. The
# forwards of Mistral (2.8 times) and Llama (3.0) were 0.97 and 0.99 times as long, GPT-NeoX's (4.2) 1.03 times.
# (python3 -m tests.measure.models --cases bert:full mistral:full llama:none gpt_neox:full)
SURELY_GPU = {False: 3.5, True: 1.7}


class Estimate(NamedTuple):
    """The milliseconds of a step that a call takes in one way.

    Attributes:
        kernels: those of the GPU's kernels, by direction.
        rest: those of all else, by its name.
        measured: whether the kernels were timed on this device, or are predicted.
    """

    kernels: tuple[float, ...]
    rest: tuple[tuple[str, float], ...] = ()
    measured: bool = False

    @property
    def total(self) -> float:
        return sum(self.kernels) + sum(ms for _, ms in self.rest)


def _least_share(inputs: CostInputs) -> float:
    """Gives the least ratio of the graphs' time to that of Inductor's kernel, for what graphs read from memory."""
    operands = [n for n in ir.walk(without_bias(inputs.program.score)[0]) if n.kind == "operand"]
    stored = [inputs.hoisted[int(n.value or 0)].stored for n in operands if {"q", "k"} <= set(n.dims)]
    if stored and (inputs.training or min(d.itemsize for d in stored) < FORWARD_ITEMSIZE):
        return PAIRS_READ
    reads = ir.walk(*(part.expression for part in inputs.hoisted if part.learned))
    return LEARNED_BY_PLACE if any(map(_is_by_place, reads)) else 0.0


def in_table(inputs: CostInputs) -> bool:
    """Whether the graphs of a call are of a kind that was measured, so that their times have no other factor, and do
    not depend on what a mask reads.
    """
    several = (divided(pruned(inputs.program, inputs.lengths), inputs.lengths, way) for way in inputs.directions)
    reads = inputs.reads_mask or split(inputs.program.mask).biases
    return not (reads or _least_share(inputs) or any(several))


def _is_by_place(read: ir.Expr) -> bool:
    """Whether it reads a captured tensor with an entry for each query or key."""
    if read.kind != "gather" or read.dtype != F32:
        return False
    indices = read.args[1:]
    by_place = any(i.kind == "index" and i.value in ("q", "k") for i in indices)
    return by_place and all(i.kind in ("index", "const") for i in indices)


@functools.lru_cache(1024)
def pairs_of(program: Program, lengths: tuple[int, int], direction: str) -> float:
    """The number of pairs of a head that the graphs of a direction compute, with other costs counted in pairs."""
    program = pruned(program, lengths)
    several = direction == FORWARD and len(divided(program, lengths, direction) or ()) > 1
    form = split(program.mask)
    factors = (PARTS_COST if several else 1.0) * (BIAS_COST if form.biases else 1.0)
    # Beside a bound that is read from memory cuDNN skips no tiles: causal and padding take 1.7 times as long as half of
    # the pairs would. (cudnn-flex bench --regret "causal + padding, right at 2,16,16,4096,128")
    reads = any(term.kind == "operand" for bound in form.bounds for _, term in bound.terms)
    shown = lengths[0] * lengths[1] if reads else _in_tiles(program, lengths, direction)
    return shown * factors


@functools.lru_cache(1024)
def _in_tiles(program: Program, lengths: tuple[int, int], direction: str) -> float:
    """The number of pairs that the mask's bounds show, in whole tiles of a graph: a diagonal halves those that it
    crosses.
    """
    form = split(program.mask)
    edges = sum(bound.diagonal for bound in form.bounds) if form.skips_tiles else 0
    return min(cost(program, lengths, direction) + edges * lengths[0] * TILE / 2, float(lengths[0] * lengths[1]))


def stock_times(inputs: CostInputs) -> dict[str, float]:
    """Milliseconds of the GPU on Inductor's kernel, by direction.

    It computes the blocks that the BlockMask lists, and the mask where a block is partial; without one, all pairs.
    """
    share, partial = inputs.blocks or ((None, GUESSED[1]) if inputs.call.blocks else (1.0, 1.0))
    found: dict[str, float] = {}
    for way in inputs.directions:
        rate = inputs.rate(INDUCTOR, way, inputs.kind) or 0.0
        if inputs.reads_mask:
            plain, masked = (inputs.rate(INDUCTOR, way, kind) or 0.0 for kind in (PLAIN, MASKED))
            rate += partial * max(masked - plain, 0.0)
        found[way] = rate * inputs.tflop * (_guessed(inputs, way) if share is None else share)
    return found


def _bounds(program: Program, lengths: tuple[int, int], direction: str) -> float:
    """The share of all pairs that the mask's bounds show, in whole tiles of a graph."""
    return _in_tiles(pruned(program, lengths), lengths, direction) / (lengths[0] * lengths[1])


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
    share = _least_share(inputs)
    return {way: max(found[way], share * ms) for way, ms in stock_times(inputs).items()} if share else found


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
    base, slope = STEP["list"]
    of_mask = batch * queries * inputs.lengths[1] * (heads if "h" in ir.axes_of(inputs.program.mask) else 1)
    looks = inputs.looks
    look = STEP["look"][not looks.compiled] * looks.pairs if looks else 0.0
    return base + (slope * of_mask + look) / 1e9


def inductors(inputs: CostInputs, measured: tuple[float, ...] = ()) -> Estimate:
    """The time on Inductor's kernel. What that takes of a step besides, all ways take. `measured` is that of `ours`."""
    return Estimate(measured or tuple(stock_times(inputs).values()), measured=bool(measured))


def ours(inputs: CostInputs, measured: tuple[float, ...] = ()) -> Estimate | None:
    """The time of a call, each direction in its way of `inputs.tiled`; None if it is not known.

    Args:
        measured: the times of the kernels, by direction, where they are known.
    """
    tiles = tile_times(inputs) if inputs.tiled else {}
    if tiles is None:
        return None
    by_graph = graph_times(inputs)
    taken = measured or [(tiles if way in inputs.tiled else by_graph)[way] for way in inputs.directions]
    launches = zip(inputs.directions, STEP["list launch"], strict=False)
    least = [ms if way in inputs.tiled else 0.0 for way, ms in launches]
    return Estimate(tuple(map(max, taken, least)), tuple(_rest(inputs, bool(measured))), bool(measured))


def _rest(inputs: CostInputs, measured: bool) -> Iterator[tuple[str, float]]:
    """The time of a step that one of our ways takes besides its kernels, or longer than Inductor's kernel does."""
    listed = bool(inputs.tiled) and inputs.reads_mask
    if listed:
        yield "list", LIST_ERROR * list_time(inputs) / inputs.sharing
    folded = inputs.lse_gradient and BACKWARD not in inputs.tiled  # engine/plans/folded_output.py
    if folded and not measured:
        rates = sum(inputs.rate(INDUCTOR, way, PLAIN) or 0.0 for way in inputs.directions)
        yield "LSE", rates * inputs.tflop * LSE_COST / inputs.lengths[1]
    if not inputs.in_a_step:
        return
    if inputs.reads_mask and inputs.in_a_model and inputs.call.blocks and not listed:
        yield "mask", STEP["mask"][0] / inputs.sharing
    if folded or host_counts(inputs):
        yield "host", STEP["host, LSE"][0] if folded else STEP["host"][inputs.training]


def host_counts(inputs: CostInputs) -> bool:
    """Whether the GPU may wait for the host, so that the host's time for a call counts."""
    around = inputs.around
    if around is None:
        return False
    gpu = STEP["product"][inputs.training] * around.tflop + around.calls * sum(stock_times(inputs).values())
    return gpu < SURELY_GPU[inputs.training] * STEP["launch"][inputs.training] * (around.products + around.calls)
