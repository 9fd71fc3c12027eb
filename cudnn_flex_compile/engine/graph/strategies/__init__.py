"""The strategies, in the order in which they are tried.

A strategy is one file with NAME and `lower(program, training) -> Lowering | Reason`. No strategy imports cudnn
before it writes nodes.
"""

from dataclasses import dataclass
from typing import Protocol

from cudnn_flex_compile.engine.graph.lowering import Lowering
from cudnn_flex_compile.engine.graph.strategies import chained, dense, native
from cudnn_flex_compile.reasons import Reason
from cudnn_flex_compile.scoremod.ir import Program


class Lower(Protocol):
    def __call__(self, program: Program, training: bool) -> Lowering | Reason: ...


@dataclass(frozen=True, slots=True)
class Strategy:
    """name: the name in reports. lower: see above."""

    name: str
    lower: Lower


STRATEGIES = tuple(Strategy(m.NAME, m.lower) for m in (native, chained, dense))
