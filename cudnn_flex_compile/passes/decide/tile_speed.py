"""Says in which directions kernels that go by a list of tiles are faster than cuDNN's graphs.

The pass asks it before it lowers a call (passes/lower_call.py). The kernels are those of cudnn.flex_attention on SM90.
"""

from cudnn_flex_compile.engine.problem import BACKWARD, FORWARD
from cudnn_flex_compile.passes.decide.cost_model import CostInputs, graph_times, list_time, tile_times

# Milliseconds that the host takes for a launch of the forward and of the backward: shorter ones would wait for it.
# (python3 -m tests.measure.documents_time)
LAUNCH_MS = {FORWARD: 0.063, BACKWARD: 0.099}
SURELY = 1.2  # a list must save so many times its own time


def faster_by_tiles(inputs: CostInputs, apart: bool) -> tuple[str, ...]:
    """The directions that are faster by a list, the time to make it included.

    Args:
        apart: whether each direction may run in its own way.
    """
    graphs, tiles = graph_times(inputs), tile_times(inputs)
    if tiles is None:
        return ()
    # None is saved where the host would take longer than the GPU.
    saved = {way: graphs[way] - ours if ours > LAUNCH_MS[way] else 0.0 for way, ours in tiles.items()}
    chosen = tuple(way for way in tiles if saved[way] > 0) if apart else inputs.directions
    listing = list_time(inputs) if inputs.reads_mask else 0.0
    return chosen if inputs.sharing * sum(saved[way] for way in chosen) > SURELY * listing else ()
