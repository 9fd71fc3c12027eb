"""Decides in which directions the kernels by a list of tiles are faster than cuDNN's graphs.

lower_call.py asks it. The kernels are those of cudnn.flex_attention on SM90; cost_model.py compares with Inductor's.
"""

from dataclasses import dataclass

from cudnn_flex_compile.engine.plans.box_plan import cost, divided
from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.passes.decide.cost_model import (
    BACKWARD_WEIGHT,
    BIAS_COST,
    CALL_TIME,
    PAIR_COST,
    PARTS_COST,
    CostInputs,
    interval_times,
)  # fmt: skip
from cudnn_flex_compile.passes.read.call import example, hint
from cudnn_flex_compile.scoremod.ir import Program
from cudnn_flex_compile.scoremod.masks.boxes import pruned
from cudnn_flex_compile.scoremod.masks.form import split


@dataclass(frozen=True, slots=True)
class Speed:
    """The speed of a kernel relative to a graph on the same pairs.

    Attributes:
        length, dim: from this length on, up to this head dim.
    """

    length: int
    dim: int
    forward: float
    backward: float


# The lowest speeds of full and causal masks with 32 / 8, 16 / 16 and 16 / 8 heads, on an H200 with cuDNN 9.19 and
# frontend 1.32. Short sequences were measured with a head dim of 64 alone. (python3 -m tests.measure.tile_lists
# --kernels)
SPEEDS = (
    Speed(1024, 64, 1.18, 1.44),
    Speed(1024, 128, 1.16, 1.05),
    Speed(1024, 256, 1.22, 0.76),
    Speed(512, 64, 0.82, 1.80),
)
# The host's time for a launch of the forward and of the backward, in milliseconds: shorter kernels would wait for it.
# (python3 -m tests.measure.documents_time)
LAUNCH_MS = {FORWARD: 0.063, BACKWARD: 0.099}
SURELY = 1.2  # a list must save so many times its own time


def faster_by_tiles(inputs: CostInputs, apart: bool) -> tuple[str, ...]:
    """The directions that are faster by a list, the time to make it included.

    Args:
        apart: whether each direction may run in its own way.
    """
    speed = _speed_of(inputs)
    if speed is None:
        return ()
    directions = (FORWARD, BACKWARD) if inputs.training else (FORWARD,)
    saved = {way: _saved(inputs, way, factor) for way, factor in zip(directions, speed, strict=False)}
    chosen = tuple(way for way in directions if saved[way] > 0) if apart else directions
    listing = interval_times(inputs)[2]
    return chosen if inputs.sharing * sum(saved[way] for way in chosen) > SURELY * listing else ()


def _speed_of(inputs: CostInputs) -> tuple[float, float] | None:
    dim, value_dim = (hint(example(n).shape[3]) for n in (inputs.call.query, inputs.call.value))
    for row in SPEEDS:
        if min(inputs.lengths) >= row.length and max(dim, value_dim) <= row.dim:
            return row.forward, row.backward
    return None


def _saved(inputs: CostInputs, direction: str, speed: float) -> float:
    """The GPU's time that a call saves by a list, in milliseconds; 0 where the host would take longer than the GPU."""
    queries, keys = inputs.lengths
    weight = BACKWARD_WEIGHT if direction == BACKWARD else 1.0
    unit = weight * PAIR_COST * CALL_TIME[False][0].slope * inputs.tflop / (queries * keys)
    program = pruned(inputs.program, inputs.lengths)
    visible = float(cost(program, inputs.lengths, direction))
    if inputs.call.blocks and inputs.share is not None:
        visible = min(visible, inputs.share * queries * keys)
    ours = unit * visible / speed
    return unit * _by_graph(program, inputs.lengths, direction) - ours if ours > LAUNCH_MS[direction] else 0.0


def _by_graph(program: Program, lengths: tuple[int, int], direction: str) -> float:
    """The number of pairs that the plans of a direction compute."""
    parts = divided(program, lengths, direction) if direction == FORWARD else None
    factor = PARTS_COST if parts is not None and len(parts) > 1 else 1.0
    return cost(program, lengths, direction) * factor * (BIAS_COST if split(program.mask).biases else 1.0)
