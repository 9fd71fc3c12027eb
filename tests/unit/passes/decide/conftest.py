"""The rules are tested on times that stay: a pair costs graphs three quarters of what it costs Inductor's kernel."""

import pytest

from cudnn_flex_compile.passes.decide import cost_inputs
from cudnn_flex_compile.passes.decide.device_times import DeviceTimes

LENGTHS, DIMS = (256, 512, 1024, 8192), (64, 128, 256)
FORWARD, BACKWARD = "forward", "backward"
STOCK, GRAPHS = {FORWARD: 2.4, BACKWARD: 6.4}, {FORWARD: 1.8, BACKWARD: 4.8}
CAP, MASK = 1.7, 2.0  # what a soft cap, and a mask at every pair, makes of Inductor's times
# How many times as fast as a graph a list of tiles is, by head dim and length.
SPEEDS = {
    (64, 256): (0.5, 0.8), (64, 512): (0.82, 1.8), (64, 1024): (1.18, 1.44), (64, 8192): (1.18, 1.44),
    (128, 256): (0.5, 0.8), (128, 512): (0.7, 0.9), (128, 1024): (1.16, 1.05), (128, 8192): (1.16, 1.05),
    (256, 256): (0.5, 0.7), (256, 512): (0.7, 0.7), (256, 1024): (1.22, 0.76), (256, 8192): (1.22, 0.76),
}  # fmt: skip


def table():
    cells = {}
    for place, direction in enumerate((FORWARD, BACKWARD)):
        for dim in DIMS:
            stock, graph = STOCK[direction], GRAPHS[direction]
            rates = {
                ("inductor", "plain"): stock, ("inductor", "capped"): CAP * stock, ("inductor", "masked"): MASK * stock,
                ("native", "plain"): graph, ("chained", "plain"): graph, ("chained", "capped"): graph,
            }  # fmt: skip
            for (way, kind), rate in rates.items():
                cells[way, direction, kind, dim] = LENGTHS, (rate,) * len(LENGTHS)
            by_list = tuple(graph / SPEEDS[dim, length][place] for length in LENGTHS)
            cells["tile_lists", direction, "plain", dim] = LENGTHS, by_list
    return DeviceTimes("a device of these tests", cells)


@pytest.fixture(autouse=True)
def device_times(monkeypatch):
    found = table()
    monkeypatch.setattr(cost_inputs, "times_of", lambda device: found)
    return found
