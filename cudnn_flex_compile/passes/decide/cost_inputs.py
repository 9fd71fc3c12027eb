"""`CostInputs` are the facts of a call that its times depend on, in one way to run it.

graph_context.py gathers them, and cost_model.py predicts times by them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.fx import Node

from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.kernels.block_mask import listed
from cudnn_flex_compile.passes.decide.device_times import CAPPED, PLAIN, DeviceTimes, times_of
from cudnn_flex_compile.passes.read.call import Call, example, hint
from cudnn_flex_compile.scoremod import ir
from cudnn_flex_compile.scoremod.ir import Program
from cudnn_flex_compile.scoremod.partition import Hoisted
from cudnn_flex_compile.torch_private import deterministic

# Functions that a kernel computes with many instructions. A score with one of them costs as much as a soft cap.
COSTLY = {"tanh", "sigmoid", "exp", "exp2", "log", "erf", "sin", "cos", "pow"}
# The calls that share a BlockMask which comes from outside of a graph with one call, and whose tensors are not at hand:
# a trainer compiles flex_attention, or each layer, by itself, and models have as many layers, or more.
LAYERS = 12
# From this head dim on a backward by lists has other kernels where heads share keys, which calibrated calls do not.
# (tests/unit/engine/tiles/test_ordered.py asks the frontend)
OTHER_KERNELS_DIM = 256


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


class Looks(NamedTuple):
    """A look at pairs, by which a list of tiles is made.

    Attributes:
        pairs: their number. compiled: whether a compiled function looks at them.
    """

    pairs: int
    compiled: bool


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
        looks: the look at pairs that a step's list takes; None where the mask's form tells the runs of rows.
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
    looks: Looks | None = None

    @property
    def directions(self) -> tuple[str, ...]:
        """The directions that may run."""
        return (FORWARD, BACKWARD) if self.training else (FORWARD,)

    @property
    def lengths(self) -> tuple[int, int]:
        """The numbers of queries and keys; 1 where there are none, so that pairs have shares."""
        queries, keys = (hint(example(node).shape[2]) for node in (self.call.query, self.call.key))
        return max(queries, 1), max(keys, 1)

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
        dim = max(hint(example(node).shape[3]) for node in (self.call.query, self.call.value))
        return self.table.rate(way, direction, kind, dim, min(self.lengths))

    @property
    def untold(self) -> bool:
        """Whether no table tells the times of its kernels: those of another kind of device, of deterministic backwards,
        or of backwards by lists of large heads that share keys.
        """
        return self.table.foreign or (self.training and deterministic()) or self._other_kernels

    @property
    def _other_kernels(self) -> bool:
        query, key = (example(node).shape for node in (self.call.query, self.call.key))
        return BACKWARD in self.tiled and hint(query[3]) >= OTHER_KERNELS_DIM and hint(query[1]) != hint(key[1])

    @property
    def table(self) -> DeviceTimes:
        return times_of(example(self.call.query).device)

    @property
    def in_a_step(self) -> bool:
        """Whether the time of a step besides the kernels counts.

        It does not on the CPU, where programs are checked and explained, and sizes tell nothing of later ones; nor with
        learned biases, for which Inductor's kernels take a multiple of ours.
        """
        on_gpu = example(self.call.query).device.type == "cuda"
        return on_gpu and self.around is not None and not any(part.learned for part in self.hoisted)

    @property
    def in_a_model(self) -> bool:
        return self.around is not None and self.around.products > 0


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
