"""The functions that cuDNN's frontend calls while it writes a score_mod's nodes into a graph.

build.py makes them for each graph, and clears them once it is built.
"""

from dataclasses import dataclass, field
from typing import Any

from cudnn_flex_compile.engine.frontend import Link
from cudnn_flex_compile.engine.graph.emit import Emitter, Inputs
from cudnn_flex_compile.engine.graph.lowering import Lowering
from cudnn_flex_compile.engine.problem import Problem


@dataclass(slots=True)
class Callbacks:
    """The state that the score_mod callbacks read.

    It is cleared once the graph is built, or refused: the graph owns the callbacks, and a callback that led back to the
    graph would keep both alive for ever (the cycle runs through C++).

    Attributes:
        building: the problem, lowering and inputs of the graph while it is built, empty afterwards.
        links: the graph's links (frontend.py).
        emitters: the emitter of each score_mod.
    """

    building: list[tuple[Inputs, Lowering]]
    links: list[Link]
    emitters: list[Emitter] = field(default_factory=list[Emitter])

    def clear(self) -> None:
        for link in self.links:
            link.cut()
        self.links.clear()
        self.building.clear()
        self.emitters.clear()

    def score_mod(self, graph: Any, score: Any) -> Any:
        inputs, lowering = self.building[0]
        self.emitters.append(Emitter(graph, inputs, score))
        return score if lowering.score_mod is None else lowering.score_mod(self.emitters[-1])

    def score_mod_bprop(self, graph: Any, grad: Any) -> Any:
        inputs, lowering = self.building[0]
        if lowering.score_mod_bprop is None:
            return grad
        emitter = self.emitters[-1]  # the forward's nodes are in the same graph, and are reused
        emitter.grad = _shaped(grad, inputs.problem)
        return lowering.score_mod_bprop(emitter)


def _shaped(grad: Any, problem: Problem) -> Any:
    """The gradient with its shape. It arrives without one, and a node would take the shape of its other input."""
    batch, heads, rows = problem.lse_shape
    columns = problem.key.shape[2]
    return grad.set_dim([batch, heads, rows, columns]).set_stride([heads * rows * columns, rows * columns, columns, 1])
