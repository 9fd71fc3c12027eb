"""Has one way to run calls win: that by a list of tiles in some directions, or by graphs in all."""

from cudnn_flex_compile.passes.decide import chooser
from cudnn_flex_compile.passes.decide.cost_model import Estimate

KEPT = ("none",)  # Inductor's kernel wins


def make_fastest(monkeypatch, directions, rest=2.0):
    """Graphs win where there is no such way.

    Args:
        rest: the time of the other ways of ours; Inductor's kernel takes 4.
    """

    def ours(inputs, measured=()):
        mine = directions == inputs.tiled or (directions == "all" and inputs.tiled == inputs.directions)
        return Estimate((1.0 if mine else rest,))

    monkeypatch.setattr(chooser, "ours", ours)
    stock = 0.5 if directions is KEPT else 4.0
    monkeypatch.setattr(chooser, "inductors", lambda inputs, measured=(): Estimate((stock,)))
